// fivedp._cpu: one box copied into another.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "common/check.hpp"
#include "cpu/dispatch.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

// A target that reaches over more memory than this is taken to be larger than a rank's part of the caches.
constexpr std::int64_t far_bytes = std::int64_t{4} << 20;

struct Dimension {
    std::int64_t count, to_stride, from_stride;
};

// The dimensions with more than one element, neighbours that are one run in both arrays joined.
std::vector<Dimension> dimensions(const py::array& target, const py::array& source) {
    std::vector<Dimension> found;
    for (py::ssize_t i = 0; i < target.ndim(); ++i) {
        const Dimension next = {target.shape(i), target.strides(i), source.strides(i)};
        if (next.count == 1) continue;
        Dimension* const last = found.empty() ? nullptr : &found.back();
        if (last != nullptr && last->to_stride == next.count * next.to_stride &&
            last->from_stride == next.count * next.from_stride)
            *last = {last->count * next.count, next.to_stride, next.from_stride};
        else
            found.push_back(next);
    }
    return found;
}

void copy_dimensions(const std::vector<Dimension>& outer, std::size_t first, CopyRows copy) {
    if (first == outer.size()) return kernels().copy_rows(copy);
    for (std::int64_t i = 0; i < outer[first].count; ++i) {
        copy_dimensions(outer, first + 1, copy);
        copy.to += outer[first].to_stride;
        copy.from += outer[first].from_stride;
    }
}

void copy_box(py::array target, const py::array& source, bool may_stream) {
    check(target.writeable(), "copy_box: target is read-only; a writeable array would be right");
    if (!target.dtype().is(source.dtype()) && !target.dtype().equal(source.dtype()))
        fail("copy_box: target is ", py::str(target.dtype()).cast<std::string>(), " and source ",
             py::str(source.dtype()).cast<std::string>(), "; one type would be right");
    check(target.ndim() == source.ndim(), "copy_box: target has ", target.ndim(), " dimensions and source ",
          source.ndim(), "; they must agree");
    for (py::ssize_t i = 0; i < target.ndim(); ++i)
        check(target.shape(i) == source.shape(i), "copy_box: dimension ", i, " is ", target.shape(i), " in target and ",
              source.shape(i), " in source; they must agree");
    if (target.size() == 0) return;

    const std::int64_t size = target.itemsize();
    std::vector<Dimension> outer = dimensions(target, source);
    CopyRows copy = {
        static_cast<char*>(target.mutable_data()), static_cast<const char*>(source.data()), 1, size, 0, 0, false};
    std::int64_t span = size;
    for (const Dimension& dimension : outer) span += (dimension.count - 1) * std::abs(dimension.to_stride);
    copy.stream = may_stream && span >= far_bytes;
    const auto take = [&outer] {
        const Dimension last = outer.back();
        outer.pop_back();
        return last;
    };
    if (!outer.empty() && outer.back().to_stride == size && outer.back().from_stride == size)
        copy.bytes = take().count * size;
    if (!outer.empty()) {
        const Dimension rows = take();
        copy.rows = rows.count;
        copy.to_stride = rows.to_stride;
        copy.from_stride = rows.from_stride;
    }
    py::gil_scoped_release no_gil;
    copy_dimensions(outer, 0, copy);
}

}  // namespace

void bind_copy(py::module_& module) {
    module.def("copy_box", &copy_box, py::arg("target"), py::arg("source"), py::arg("may_stream"));
}

}  // namespace fivedp
