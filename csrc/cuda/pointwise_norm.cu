// Norms of rows. A block has one row: it is read once into registers, 16 bytes a load where it is aligned, summed in a
// fixed tree, scaled and written. Bytes: each element read once and written once; 4 FLOPs an element.
#include "cuda/block_sum.cuh"
#include "cuda/pointwise.hpp"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int norm_threads = 256;
// Elements of a row that a thread keeps in registers; longer rows are read twice.
constexpr int kept = 32;

template <class T>
FIVEDP_KERNEL(norm_threads, 2)
rms_norm_rows(const T* x, const T* gain, T* y, Sum<T>* inverse, std::int64_t columns, std::int64_t x_stride,
              std::int64_t y_stride, Sum<T> epsilon) {
    using S = Sum<T>;
    FIVEDP_SHARED S room[norm_threads / 32];
    const std::int64_t row = block_x();
    x += row * x_stride;
    y += row * y_stride;
    S values[kept], sum = 0;
    FIVEDP_UNROLL
    for (int i = 0; i < kept; ++i) {
        const std::int64_t column = thread() + static_cast<std::int64_t>(i) * norm_threads;
        values[i] = column < columns ? to_float(x[column]) : S(0);
        sum += values[i] * values[i];
    }
    for (std::int64_t column = thread() + static_cast<std::int64_t>(kept) * norm_threads; column < columns;
         column += norm_threads) {
        const S value = to_float(x[column]);
        sum += value * value;
    }
    const S scale = S(1) / sqrt(block_sum(sum, room) / static_cast<S>(columns) + epsilon);
    if (inverse != nullptr && thread() == 0) inverse[row] = scale;
    FIVEDP_UNROLL
    for (int i = 0; i < kept; ++i) {
        const std::int64_t column = thread() + static_cast<std::int64_t>(i) * norm_threads;
        if (column < columns)
            y[column] = from_float<T>(values[i] * scale * (gain != nullptr ? to_float(gain[column]) : S(1)));
    }
    for (std::int64_t column = thread() + static_cast<std::int64_t>(kept) * norm_threads; column < columns;
         column += norm_threads)
        y[column] = from_float<T>(to_float(x[column]) * scale * (gain != nullptr ? to_float(gain[column]) : S(1)));
}

}  // namespace

void rms_norm_forward(const RmsNormProblem& p, Stream stream) {
    with_type(p.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch(rms_norm_rows<T>, p.rows, 1, 1, norm_threads, 0, stream, static_cast<const T*>(p.x),
               static_cast<const T*>(p.gain), static_cast<T*>(p.y), static_cast<Sum<T>*>(p.inverse), p.columns,
               p.x_stride, p.y_stride, static_cast<Sum<T>>(p.epsilon));
    });
}

}  // namespace fivedp
