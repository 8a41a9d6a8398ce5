// Rotary embedding of device arrays: arguments are checked here, then a kernel is started on the stream.
#include <pybind11/pybind11.h>

#include "bindings/device_arrays.hpp"
#include "cuda/pointwise_rotary.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

void rotate(const py::object& x_object, const py::object& y_object, const py::object& cosines_object,
            const py::object& sines_object, const py::object& positions_object, double base, std::int64_t rotated,
            bool interleaved, bool inverse, std::uintptr_t stream) {
    const DeviceArray x = device_array(x_object, "rotary: x"), y = device_array(y_object, "rotary: y");
    const std::size_t n = x.shape.size();
    check(n == 3 || n == 4, "rotary: x has shape ", text_of(x.shape),
          "; (tokens, heads, head size), or (batch, tokens, heads, head size), would be right");
    RotaryProblem problem{};
    problem.type = number_type(x, "rotary: x");
    problem.batch = n == 4 ? x.shape[0] : 1;
    problem.sequence = x.shape[n - 3];
    problem.heads = x.shape[n - 2];
    problem.size = x.shape[n - 1];
    problem.rotated = rotated;
    check(rotated >= 0 && rotated % 2 == 0 && rotated <= problem.size, "rotary: rotated is ", rotated,
          " of a head size of ", problem.size, "; an even number up to it would be right");
    const std::vector<std::int64_t> x_strides = expect_rows(x, x.type, x.shape, false, "rotary: x");
    const std::vector<std::int64_t> y_strides = expect_rows(y, x.type, x.shape, true, "rotary: y");
    for (std::size_t d = 0; d + 1 < n; ++d) {
        problem.x_strides[4 - n + d] = x_strides[d];
        problem.y_strides[4 - n + d] = y_strides[d];
    }
    check(x.data != y.data || x_strides == y_strides,
          "rotary: y begins where x does with other strides; x itself, or other memory, would be right");
    problem.x = x.data;
    problem.y = y.data;
    problem.interleaved = interleaved;
    problem.inverse = inverse;
    problem.base = base;
    check(cosines_object.is_none() == sines_object.is_none(),
          "rotary: one of cosines and sines is None; both, or neither, would be right");
    if (!cosines_object.is_none()) {
        const DeviceArray cosines = device_array(cosines_object, "rotary: cosines");
        const DeviceArray sines = device_array(sines_object, "rotary: sines");
        check(cosines.shape.size() == 2, "rotary: cosines has shape ", text_of(cosines.shape),
              "; (positions, rotated / 2) would be right");
        problem.table_rows = cosines.shape[0];
        const std::vector<std::int64_t> shape = {problem.table_rows, rotated / 2};
        expect(cosines, sum_type_of(problem.type), shape, false, "rotary: cosines");
        expect(sines, sum_type_of(problem.type), shape, false, "rotary: sines");
        problem.cosines = cosines.data;
        problem.sines = sines.data;
    } else {
        check(base > 0, "rotary: base is ", base, "; a positive number would be right");
    }
    if (!positions_object.is_none()) {
        const DeviceArray positions = device_array(positions_object, "rotary: positions");
        const bool of_each = n == 4 && positions.shape.size() == 2;
        expect(positions, "i8",
               of_each ? std::vector<std::int64_t>{problem.batch, problem.sequence}
                       : std::vector<std::int64_t>{problem.sequence},
               false, "rotary: positions");
        problem.positions = reinterpret_cast<const std::int64_t*>(positions.data);
        problem.positions_stride = of_each ? problem.sequence : 0;
    }
    rotary(problem, stream_of(stream));
}

}  // namespace

void bind_cuda_rotary(py::module_& module) {
    module.def("rotary", &rotate);
}

}  // namespace fivedp
