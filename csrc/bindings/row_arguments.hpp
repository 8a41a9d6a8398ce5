// Arguments of the experts' kernels: matrices given as arrays or as tables of rows, borders of groups, one number a
// row.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/arguments.hpp"
#include "common/check.hpp"
#include "cpu/block_queue.hpp"
#include "cpu/grouped_problem.hpp"

namespace fivedp {

inline std::string shape_of(const pybind11::array& array) {
    std::ostringstream text;
    text << "(";
    for (pybind11::ssize_t i = 0; i < array.ndim(); ++i) text << (i ? ", " : "") << array.shape(i);
    text << (array.ndim() == 1 ? ",)" : ")");
    return text.str();
}

inline pybind11::array array_of(const pybind11::handle& argument, const char* who, const char* name) {
    if (!pybind11::isinstance<pybind11::array>(argument))
        throw pybind11::type_error(std::string(who) + ": " + name + " is " + Py_TYPE(argument.ptr())->tp_name +
                                   "; a NumPy array would be right");
    return pybind11::reinterpret_borrow<pybind11::array>(argument);
}

inline char* data_of(const pybind11::array& array) {
    return static_cast<char*>(const_cast<void*>(array.data()));
}

inline void check_writable(const pybind11::array& array, const char* who, const char* name) {
    check(array.writeable(), who, ": ", name, " is read-only; a writable array would be right");
}

inline void check_type(ElementType type, ElementType wanted, const char* who, const char* name) {
    if (type != wanted)
        throw pybind11::type_error(std::string(who) + ": " + name + " is " + name_of(type) + "; " + name_of(wanted) +
                                   " would be right");
}

inline ElementType sum_type(ElementType type) {
    return type == ElementType::f64 ? ElementType::f64 : ElementType::f32;
}

// Whether sums over elements of `type` can be stored as `out`.
inline void check_result_type(ElementType out, ElementType type, bool bf16_too, const char* who, const char* name) {
    const bool fits = out == type || (type == ElementType::bf16 && out == ElementType::f32) ||
                      (bf16_too && type == ElementType::f32 && out == ElementType::bf16);
    if (!fits)
        throw pybind11::type_error(std::string(who) + ": " + name + " is " + name_of(out) + " beside operands of " +
                                   name_of(type) + "; " +
                                   (type == ElementType::f64                ? "float64"
                                    : bf16_too || type == ElementType::bf16 ? "float32 or bfloat16"
                                                                            : "float32") +
                                   " would be right");
}

// Whole numbers, copied: nobody may change them while the kernels read them.
template <class Int>
std::vector<Int> integers(const pybind11::handle& argument, const char* who, const char* name) {
    const pybind11::array array = array_of(argument, who, name);
    if (array.dtype().kind() != 'i' || array.itemsize() != sizeof(Int) || !native_order(array))
        throw pybind11::type_error(std::string(who) + ": " + name + " is " +
                                   pybind11::str(array.dtype()).cast<std::string>() + "; int" +
                                   std::to_string(8 * sizeof(Int)) + " would be right");
    check(array.ndim() == 1, who, ": ", name, " has shape ", shape_of(array), "; one dimension would be right");
    std::vector<Int> values(static_cast<std::size_t>(array.shape(0)));
    for (std::size_t i = 0; i < values.size(); ++i)
        std::memcpy(&values[i], data_of(array) + static_cast<pybind11::ssize_t>(i) * array.strides(0), sizeof(Int));
    return values;
}

// Rising borders from 0 to `end`.
inline std::vector<std::int64_t> borders(const pybind11::handle& argument, std::int64_t end, const char* who,
                                         const char* name) {
    std::vector<std::int64_t> values = integers<std::int64_t>(argument, who, name);
    check(!values.empty(), who, ": ", name, " is empty; one border more than groups would be right");
    check(values.front() == 0 && values.back() == end, who, ": ", name, " goes from ", values.front(), " to ",
          values.back(), "; 0 to ", end, ", the number of rows, would be right");
    for (std::size_t i = 0; i + 1 < values.size(); ++i)
        check(values[i] <= values[i + 1], who, ": ", name, " falls from ", values[i], " to ", values[i + 1],
              " at entry ", i, "; rising borders would be right");
    return values;
}

// The counter that processes share: the next tile and the tiles done; None where there is none.
inline SharedTiles shared_tiles(const pybind11::handle& argument, const char* who) {
    if (argument.is_none()) return {nullptr, nullptr};
    const pybind11::array array = array_of(argument, who, "tiles");
    check(array.dtype().kind() == 'i' && array.itemsize() == 8 && native_order(array) && array.ndim() == 1 &&
              array.shape(0) >= 2 && array.strides(0) == 8 && reinterpret_cast<std::uintptr_t>(data_of(array)) % 8 == 0,
          who, ": tiles is ", pybind11::str(array.dtype()).cast<std::string>(), " of shape ", shape_of(array),
          "; two numbers or more in contiguous int64 would be right");
    check_writable(array, who, "tiles");
    std::int64_t* const counters = reinterpret_cast<std::int64_t*>(data_of(array));
    return {counters, counters + 1};
}

// Rows that lie anywhere: pointers, checked once, and the arrays that they point into.
struct RowTable {
    std::vector<const char*> rows;
    std::int64_t columns = 0;
    ElementType type = ElementType::f32;
    pybind11::list arrays;

    RowTable(const pybind11::sequence& sequence, const pybind11::handle& source, const pybind11::handle& index) {
        check(sequence.size() > 0, "Rows: arrays is empty; at least one array would be right");
        std::vector<pybind11::array> sources;
        for (const pybind11::handle item : sequence) {
            const pybind11::array array = array_of(item, "Rows", "an array");
            check(array.ndim() == 2, "Rows: array ", sources.size(), " has shape ", shape_of(array),
                  "; (rows, columns) would be right");
            const ElementType its_type = type_of(array, "Rows", "an array");
            if (sources.empty()) {
                columns = array.shape(1);
                type = its_type;
            }
            if (its_type != type)
                throw pybind11::type_error(std::string("Rows: the arrays are ") + name_of(type) + " and " +
                                           name_of(its_type) + "; one type would be right");
            check(array.shape(1) == columns, "Rows: array ", sources.size(), " has ", array.shape(1),
                  " columns and array 0 has ", columns, "; they must agree");
            check(columns <= 1 || array.shape(0) == 0 || array.strides(1) == array.itemsize(), "Rows: array ",
                  sources.size(), " is strided along its columns; contiguous rows would be right");
            sources.push_back(array);
            arrays.append(array);
        }
        const std::vector<std::int32_t> from = integers<std::int32_t>(source, "Rows", "source");
        const std::vector<std::int32_t> row = integers<std::int32_t>(index, "Rows", "index");
        check(from.size() == row.size(), "Rows: source has ", from.size(), " entries and index ", row.size(),
              "; as many would be right");
        rows.reserve(from.size());
        for (std::size_t i = 0; i < from.size(); ++i) {
            check(from[i] >= 0 && static_cast<std::size_t>(from[i]) < sources.size(), "Rows: source[", i, "] is ",
                  from[i], "; 0 to ", sources.size() - 1, " would be right");
            const pybind11::array& array = sources[static_cast<std::size_t>(from[i])];
            check(row[i] >= 0 && row[i] < array.shape(0), "Rows: index[", i, "] is ", row[i], " and array ", from[i],
                  " has ", array.shape(0), " rows; an index below that would be right");
            rows.push_back(data_of(array) + row[i] * array.strides(0));
        }
    }
};

// A matrix given as an array or as a table of rows.
struct Matrix {
    RowsView view;
    std::int64_t rows, columns, column_stride;

    std::int64_t item() const { return size_of(view.type); }
    RowsPiece piece(std::int64_t k_begin) const { return {view, k_begin, k_begin + columns, column_stride}; }
};

inline Matrix matrix_of(const pybind11::handle& argument, const char* who, const char* name) {
    if (pybind11::isinstance<RowTable>(argument)) {
        const RowTable& table = pybind11::cast<const RowTable&>(argument);
        // A table of no rows still has to be one.
        static const char* const none = nullptr;
        return {{nullptr, 0, table.rows.empty() ? &none : table.rows.data(), table.type},
                static_cast<std::int64_t>(table.rows.size()),
                table.columns,
                size_of(table.type)};
    }
    const pybind11::array array = array_of(argument, who, name);
    check(array.ndim() == 2, who, ": ", name, " has shape ", shape_of(array), "; (rows, columns) would be right");
    return {{data_of(array), array.strides(0), nullptr, type_of(array, who, name)},
            array.shape(0),
            array.shape(1),
            array.strides(1)};
}

// A matrix whose rows are contiguous.
inline Matrix rows_of(const pybind11::handle& argument, const char* who, const char* name) {
    const Matrix matrix = matrix_of(argument, who, name);
    check(matrix.columns <= 1 || matrix.rows == 0 || matrix.column_stride == matrix.item(), who, ": ", name,
          " is strided along its columns; contiguous rows would be right");
    return matrix;
}

inline void check_shape(const Matrix& matrix, std::int64_t rows, std::int64_t columns, const char* who,
                        const char* name) {
    check(matrix.rows == rows && matrix.columns == columns, who, ": ", name, " has shape (", matrix.rows, ", ",
          matrix.columns, "); (", rows, ", ", columns, ") would be right");
}

// An array of rows to be written.
inline RowsView written_rows(const pybind11::handle& argument, std::int64_t rows, std::int64_t columns, const char* who,
                             const char* name) {
    const pybind11::array array = array_of(argument, who, name);
    const Matrix matrix = rows_of(array, who, name);
    check_shape(matrix, rows, columns, who, name);
    check_writable(array, who, name);
    return matrix.view;
}

// One number a row: contiguous, of the type of sums.
inline char* row_values(const pybind11::handle& argument, std::int64_t rows, ElementType type, bool written,
                        const char* who, const char* name) {
    const pybind11::array array = array_of(argument, who, name);
    check_type(type_of(array, who, name), sum_type(type), who, name);
    check(array.ndim() == 1 && array.shape(0) == rows, who, ": ", name, " has shape ", shape_of(array), "; (", rows,
          ",) would be right");
    check(rows <= 1 || array.strides(0) == array.itemsize(), who, ": ", name,
          " is strided; a contiguous array would be right");
    if (written) check_writable(array, who, name);
    // Of no elements, but given.
    static char none = 0;
    return data_of(array) != nullptr ? data_of(array) : &none;
}

}  // namespace fivedp
