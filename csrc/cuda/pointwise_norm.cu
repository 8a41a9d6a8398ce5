// RMSNorm and LayerNorm of rows, with the sum of a residual before them; forward and backward.
//
// A row is read once, kept in registers as it is stored (8 pieces of 16 bytes a thread, 2 in the backward: rows of up
// to 32 or 8 KB; what is longer is read again, from the L2 cache), summed in a fixed tree, scaled and written.
// LayerNorm takes the mean first and then the squares of the differences, from the registers: nothing cancels. Bytes:
// each element read once and written once, twice with a residual; about 4 FLOPs an element, 12 in the backward.
//
// Gradients of gain and bias are sums over rows. A block of the backward goes through rows b, b + n, ... and keeps its
// sums in shared memory; element e of piece p lies at e * pieces + p, so that the lanes of a warp meet different banks.
// At its end it writes them to its part of a workspace, and a second kernel adds the parts, 8 chains of every eighth,
// then a tree. No atomics: the order is a function of the sizes. Rows too long for shared memory have their sums in
// the workspace from the start.
#include "cuda/pointwise_norm.hpp"

#include <algorithm>

#include "cuda/rows.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

// The backward keeps fewer: of two arrays, and with what both of its passes make of them.
constexpr int kept_forward = 8, kept_backward = 2;
// What fits on every chip from 8.0, for two or three blocks on a multiprocessor of most.
constexpr std::int64_t shared_for_sums = 64 * 1024;
constexpr std::int64_t most_partials = 256;
constexpr std::int64_t room_bytes = 256;

template <class T>
FIVEDP_KERNEL(row_threads, 2)
norm_rows(NormProblem p, int warps, bool wide) {
    using S = Sum<T>;
    constexpr int n = piece<T>;
    S* const room = reinterpret_cast<S*>(dynamic_shared());
    const RowPlace place = row_place(warps);
    const std::int64_t row = block_x() * (row_warps / warps) + place.row;
    const std::int64_t columns = row < p.rows ? p.columns : 0;  // a row that is not there takes part in the sums
    const T* const x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* const residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* const sum = static_cast<T*>(p.sum) + row * p.sum_stride;
    T* const y = static_cast<T*>(p.y) + row * p.y_stride;
    const T* const gain = static_cast<const T*>(p.gain);
    const T* const bias = static_cast<const T*>(p.bias);
    const std::int64_t begin = n * place.thread, step = n * place.threads;

    const auto add = [&](std::int64_t first) {
        Elements<T, n> values = load_elements<n>(x, first, columns, wide);
        if (p.residual != nullptr) {
            const Elements<T, n> others = load_elements<n>(residual, first, columns, wide);
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e)
                values.at[e] = from_float<T>(S(to_float(values.at[e]) + to_float(others.at[e])));
            store_elements<n>(sum, first, columns, wide, values);
        }
        return values;
    };
    Elements<T, n> kept[kept_forward];
    FIVEDP_UNROLL
    for (int i = 0; i < kept_forward; ++i) kept[i] = add(begin + i * step);
    if (p.residual != nullptr)
        for (std::int64_t first = begin + kept_forward * step; first < columns; first += step) add(first);

    // work(first, values) on this thread's pieces of s
    const T* const again = p.residual != nullptr ? sum : x;
    const auto each_piece = [&](const auto& work) {
        FIVEDP_UNROLL
        for (int i = 0; i < kept_forward; ++i)
            if (begin + i * step < columns) work(begin + i * step, kept[i]);
        for (std::int64_t first = begin + kept_forward * step; first < columns; first += step)
            work(first, load_elements<n>(again, first, columns, wide));
    };

    S mean[1] = {0};
    if (p.centered) {
        each_piece([&](std::int64_t, const Elements<T, n>& values) {
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) mean[0] += to_float(values.at[e]);  // zeros beyond the row's end
        });
        row_sums(mean, warps, room);
        mean[0] /= static_cast<S>(p.columns);
    }
    S squares[1] = {0};
    each_piece([&](std::int64_t first, const Elements<T, n>& values) {
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) {
            const S difference = first + e < columns ? to_float(values.at[e]) - mean[0] : S(0);
            squares[0] += difference * difference;
        }
    });
    row_sums(squares, warps, room);
    const S inverse = S(1) / sqrt(squares[0] / static_cast<S>(p.columns) + static_cast<S>(p.epsilon));
    if (columns > 0 && place.thread == 0) {
        if (p.mean != nullptr) static_cast<S*>(p.mean)[row] = mean[0];
        if (p.inverse != nullptr) static_cast<S*>(p.inverse)[row] = inverse;
    }
    each_piece([&](std::int64_t first, const Elements<T, n>& values) {
        S scaled[n];
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) scaled[e] = (to_float(values.at[e]) - mean[0]) * inverse;
        if (gain != nullptr) {
            const Elements<T, n> factors = load_elements<n>(gain, first, columns, wide);
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) scaled[e] *= to_float(factors.at[e]);
        }
        if (bias != nullptr) {
            const Elements<T, n> added = load_elements<n>(bias, first, columns, wide);
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) scaled[e] += to_float(added.at[e]);
        }
        Elements<T, n> result;
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) result.at[e] = from_float<T>(scaled[e]);
        store_elements<n>(y, first, columns, wide, result);
    });
}

// With a = gain * dy and h = (s - mean) * inverse: dx = inverse * (a - mean(a) - h * mean(a h)) + d_sum, mean(a) for
// LayerNorm only; d_gain is the sum of dy * h over rows, d_bias that of dy.
template <class T>
FIVEDP_KERNEL(row_threads, 2)
norm_gradient_rows(NormGradientProblem p, int warps, bool wide, bool sums_shared, std::int64_t pieces) {
    using S = Sum<T>;
    constexpr int n = piece<T>;
    S* const room = reinterpret_cast<S*>(dynamic_shared());
    const RowPlace place = row_place(warps);
    const int groups = row_warps / warps, n_sums = p.d_bias != nullptr ? 2 : 1;
    const bool sums_wanted = p.d_gain != nullptr || p.d_bias != nullptr;
    const std::int64_t width = pieces * n, begin = n * place.thread, step = n * place.threads;
    const T* const gain = static_cast<const T*>(p.gain);
    // This group's sums of dy * h, and `width` further those of dy.
    S* const part = static_cast<S*>(p.workspace) + (sums_wanted ? block_x() * n_sums * width : 0);
    S* const shared_sums = reinterpret_cast<S*>(dynamic_shared() + room_bytes);
    S* const sums = sums_shared ? shared_sums + place.row * n_sums * width : part;
    if (sums_wanted)
        for (std::int64_t at = place.thread; at < pieces; at += place.threads)
            for (int e = 0; e < n * n_sums; ++e) sums[e * pieces + at] = S(0);

    for (std::int64_t base = block_x() * groups; base < p.rows; base += blocks_x() * groups) {
        const std::int64_t row = base + place.row, columns = row < p.rows ? p.columns : 0;
        const T* const dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
        const T* const s = static_cast<const T*>(p.sum) + row * p.sum_stride;
        const T* const d_sum = static_cast<const T*>(p.d_sum) + row * p.d_sum_stride;
        T* const dx = static_cast<T*>(p.dx) + row * p.dx_stride;
        const S inverse = columns > 0 ? static_cast<const S*>(p.inverse)[row] : S(0);
        const S mean = p.centered && columns > 0 ? static_cast<const S*>(p.mean)[row] : S(0);

        Elements<T, n> kept_dy[kept_backward], kept_s[kept_backward];
        FIVEDP_UNROLL
        for (int i = 0; i < kept_backward; ++i) {
            kept_dy[i] = load_elements<n>(dy, begin + i * step, columns, wide);
            kept_s[i] = load_elements<n>(s, begin + i * step, columns, wide);
        }
        // work(first, dy, h, a) on this thread's pieces
        const auto one_piece = [&](std::int64_t first, const Elements<T, n>& stored_dy, const Elements<T, n>& stored_s,
                                   const auto& work) {
            S d[n], h[n], a[n];
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) {
                a[e] = d[e] = to_float(stored_dy.at[e]);
                h[e] = first + e < columns ? (to_float(stored_s.at[e]) - mean) * inverse : S(0);
            }
            if (gain != nullptr) {
                const Elements<T, n> factors = load_elements<n>(gain, first, columns, wide);
                FIVEDP_UNROLL
                for (int e = 0; e < n; ++e) a[e] *= to_float(factors.at[e]);
            }
            work(first, d, h, a);
        };
        const auto each_piece = [&](const auto& work) {
            FIVEDP_UNROLL
            for (int i = 0; i < kept_backward; ++i)
                if (begin + i * step < columns) one_piece(begin + i * step, kept_dy[i], kept_s[i], work);
            for (std::int64_t first = begin + kept_backward * step; first < columns; first += step)
                one_piece(first, load_elements<n>(dy, first, columns, wide), load_elements<n>(s, first, columns, wide),
                          work);
        };
        S means[2] = {0, 0};  // of a and of a h
        each_piece([&](std::int64_t first, const S(&d)[n], const S(&h)[n], const S(&a)[n]) {
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) {
                means[0] += a[e];
                means[1] += a[e] * h[e];
            }
            if (sums_wanted) {
                S* const mine = sums + first / n;
                FIVEDP_UNROLL
                for (int e = 0; e < n; ++e) mine[e * pieces] += d[e] * h[e];
                if (n_sums == 2) {
                    FIVEDP_UNROLL
                    for (int e = 0; e < n; ++e) mine[width + e * pieces] += d[e];
                }
            }
        });
        row_sums(means, warps, room);
        const S mean_a = p.centered ? means[0] / static_cast<S>(p.columns) : S(0);
        const S mean_ah = means[1] / static_cast<S>(p.columns);
        each_piece([&](std::int64_t first, const S(&)[n], const S(&h)[n], const S(&a)[n]) {
            S gradient[n];
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) gradient[e] = inverse * (a[e] - mean_a - h[e] * mean_ah);
            if (p.d_sum != nullptr) {
                const Elements<T, n> others = load_elements<n>(d_sum, first, columns, wide);
                FIVEDP_UNROLL
                for (int e = 0; e < n; ++e) gradient[e] += to_float(others.at[e]);
            }
            Elements<T, n> result;
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) result.at[e] = from_float<T>(gradient[e]);
            store_elements<n>(dx, first, columns, wide, result);
        });
    }
    if (sums_wanted && sums_shared) {
        sync_block();
        for (std::int64_t at = thread(); at < n_sums * width; at += row_threads) {
            S total = shared_sums[at];
            for (int group = 1; group < groups; ++group) total += shared_sums[group * n_sums * width + at];
            part[at] = total;
        }
    }
}

// The parts of the workspace, added for 32 places of it at a time.
template <class T>
FIVEDP_KERNEL(row_threads, 2)
norm_parameter_gradients(NormGradientProblem p, std::int64_t pieces) {
    using S = Sum<T>;
    constexpr int n = piece<T>;
    S(*const room)[32] = reinterpret_cast<S(*)[32]>(dynamic_shared());
    const std::int64_t width = pieces * n, at = 32 * block_x() + lane(), which = block_y();
    const std::int64_t stride = (p.d_bias != nullptr ? 2 : 1) * width;
    const S* const workspace = static_cast<const S*>(p.workspace) + which * width;
    const int mine = thread() / 32;
    S sum = 0;
    if (at < width)
        for (std::int64_t part = mine; part < p.n_partials; part += row_warps) sum += workspace[part * stride + at];
    room[mine][lane()] = sum;
    for (int half = row_warps / 2; half > 0; half /= 2) {
        sync_block();
        if (mine < half) room[mine][lane()] += room[mine + half][lane()];
    }
    const std::int64_t column = at % pieces * n + at / pieces;
    void* const to = which == 0 ? p.d_gain : p.d_bias;
    if (mine > 0 || at >= width || column >= p.columns || to == nullptr) return;
    if (p.gradients_of_sums)
        static_cast<S*>(to)[column] = room[0][lane()];
    else
        static_cast<T*>(to)[column] = from_float<T>(room[0][lane()]);
}

}  // namespace

std::int64_t norm_partials(DeviceType type, std::int64_t rows, std::int64_t columns) {
    const int groups = row_warps / warps_of_a_row(columns, 16 / element_bytes(type));
    return std::min((rows + groups - 1) / groups, most_partials);
}

std::int64_t norm_width(DeviceType type, std::int64_t columns) {
    const std::int64_t n = 16 / element_bytes(type);
    return (columns + n - 1) / n * n;
}

void norm_forward(const NormProblem& p, Stream stream) {
    const std::int64_t size = element_bytes(p.type);
    const int warps = warps_of_a_row(p.columns, 16 / element_bytes(p.type));
    const bool wide = lies_wide(p.x, p.x_stride * size) && lies_wide(p.residual, p.residual_stride * size) &&
                      lies_wide(p.sum, p.sum_stride * size) && lies_wide(p.y, p.y_stride * size) &&
                      lies_wide(p.gain, 0) && lies_wide(p.bias, 0);
    const std::int64_t groups = row_warps / warps;
    if (p.columns == 0) return;
    with_type(p.type, [&](auto tag) {
        launch(norm_rows<typename decltype(tag)::type>, (p.rows + groups - 1) / groups, 1, 1, row_threads, room_bytes,
               stream, p, warps, wide);
    });
}

void norm_backward(const NormGradientProblem& p, Stream stream) {
    const std::int64_t size = element_bytes(p.type), width = norm_width(p.type, p.columns), pieces = width * size / 16;
    const int warps = warps_of_a_row(p.columns, 16 / element_bytes(p.type));
    const bool wide = lies_wide(p.dy, p.dy_stride * size) && lies_wide(p.sum, p.sum_stride * size) &&
                      lies_wide(p.d_sum, p.d_sum_stride * size) && lies_wide(p.dx, p.dx_stride * size) &&
                      lies_wide(p.gain, 0);
    const std::int64_t n_sums = p.d_bias != nullptr ? 2 : 1, sum_size = p.type == DeviceType::f64 ? 8 : 4;
    const std::int64_t sums = row_warps / warps * n_sums * width * sum_size;
    // Rows of fewer than 8 warps always fit: 1024 pieces in all groups at most.
    const bool sums_wanted = p.d_gain != nullptr || p.d_bias != nullptr;
    const bool sums_shared = sums_wanted && sums <= shared_for_sums;
    const std::int64_t shared = room_bytes + (sums_shared ? sums : 0);
    if (p.columns == 0) return;
    with_type(p.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch(norm_gradient_rows<T>, norm_partials(p.type, p.rows, p.columns), 1, 1, row_threads, shared, stream, p,
               warps, wide, sums_shared, pieces);
        // Without rows there are no parts, and the gradients are zeros.
        if (sums_wanted)
            launch(norm_parameter_gradients<T>, (width + 31) / 32, n_sums, 1, row_threads,
                   static_cast<std::int64_t>(row_warps * 32 * sizeof(Sum<T>)), stream, p, pieces);
    });
}

}  // namespace fivedp
