// The main loop of all products: one block of threads makes one tile of C.
//
// Tile: 128 x 128 (64 x 64 for float64), 4 warps, each a quarter; depth 128 bytes of k (64 values of 16 bits, 32
// floats, 16 doubles) a stage, 3 stages of cp.async in 96 KiB (48 KiB for float64): two blocks on a multiprocessor of
// 228 KiB. Products: mma.sync m16n8k16 for bfloat16 and float16; for float32 three m16n8k8 of TF32, with a = a_high +
// a_low, b likewise, a_low b_high + a_high b_low + a_high b_high (a factor is then right to 2^-22; an infinite one
// gives NaN); m8n8k4 for float64. For a tile 2 * 128 * 128 * k FLOPs and (128 + 128) * k elements read.
//
// Either factor may have its elements contiguous along k or along the other index. A panel is kept in shared memory as
// it lies in global memory: as rows of 128 bytes along k, or as `depth` rows along the other index, whose 8 x 8
// matrices ldmatrix transposes. The 16-byte chunk c of row r is at c ^ swizzle(r), so that neither the 8 rows of an
// ldmatrix nor the lanes of a plain load meet in a bank. Which of the two it is, is known at run time only (one kernel
// serves all four cases): ldmatrix is predicated, and one formula gives the addresses of both.
//
// Order of a sum over k: a virtual shard is one chain in rising k, in blocks of one matrix instruction counted from the
// shard's start; its last block is filled up with zeros. Shards are joined in the binary tree of cpu/sum_plan.hpp. Open
// sums wait in a workspace in global memory, where each thread finds its own again: for 8 shards 7 tiles are written
// and read once, which the L2 cache serves. So an element's bits depend on its row of A, its column of B and the
// borders of the shards alone, and a partial product over an aligned span of shards is an open sum of the whole.
#pragma once

#include <type_traits>

#include "cuda/product_tile.cuh"

namespace fivedp {

constexpr int gemm_threads = 128, gemm_stages = 3;

template <class T>
struct GemmTile {
    static constexpr int item = sizeof(T), per_chunk = 16 / item;
    static constexpr int size = item == 8 ? 64 : 128, depth = 128 / item, of_warp = size / 2;
    static constexpr int panel_bytes = size * 128, stage_bytes = 2 * panel_bytes;
    static constexpr int shared_bytes = gemm_stages * stage_bytes;
    static constexpr int row_tiles = of_warp / 16, column_tiles = of_warp / 8;
};

// A warp's quarter of the tile: accumulators of 16 x 8, laid out as matrix.cuh says.
template <class T>
struct GemmSums {
    Sum<T> at[GemmTile<T>::row_tiles][GemmTile<T>::column_tiles][4];
};

template <class T>
using TileOpenSums = OpenSums<Sum<T>, GemmTile<T>::size * GemmTile<T>::size / gemm_threads, gemm_threads>;

template <class T>
FIVEDP_DEVICE void clear(GemmSums<T>& sums) {
    FIVEDP_UNROLL
    for (auto& row : sums.at)
        for (auto& tile : row)
            for (auto& value : tile) value = 0;
}

// What a chunk's place is XORed with. Lanes of a plain load are 8 rows x 4 k of 4 bytes, 4 x 4 of 8 bytes a half warp.
template <class T, bool along_k>
FIVEDP_DEVICE int swizzle(int row) {
    return sizeof(T) == 8 || (sizeof(T) == 4 && along_k) ? 2 * (row & 3) : row & 7;
}

// Column o of a tile of two products, gate and up in turns of 8 columns, so that a thread has both of an element.
FIVEDP_DEVICE bool is_second(int o) {
    return o / 8 % 2 != 0;
}
FIVEDP_DEVICE int within_pair(int o) {
    return o / 16 * 8 + o % 8;
}

// Copies a panel, zeros where rows or columns have ended. With `second`, the panel has two factors in turns.
template <class T, bool along_k>
FIVEDP_DEVICE void copy_panel(char* to, const GemmOperand& from, const GemmOperand* second, std::int64_t batch,
                              std::int64_t first_row, std::int64_t first_column, int n_rows, int n_columns) {
    using Tile = GemmTile<T>;
    constexpr int rows = along_k ? Tile::depth : Tile::size, columns = along_k ? Tile::size : Tile::depth;
    constexpr int chunks = columns / Tile::per_chunk, rows_a_pass = gemm_threads / chunks;
    const int me = computed_here(thread()), chunk = me % chunks, row_of_thread = me / chunks;
    const int place = chunk * Tile::per_chunk;
    const int column = along_k && second != nullptr ? within_pair(place) : place;
    const int left = n_columns - column;
    const int present = left < 0 ? 0 : left > Tile::per_chunk ? Tile::per_chunk : left;

    const auto copy = [&](int pass, bool vectors) {
        const int row = row_of_thread + pass * rows_a_pass;
        char* const target = to + row * chunks * 16 + ((chunk ^ swizzle<T, along_k>(row)) * 16);
        const int source_row = !along_k && second != nullptr ? within_pair(row) : row;
        const GemmOperand& one = second != nullptr && is_second(along_k ? place : row) ? *second : from;
        copy_chunk<T>(target, one, vectors, batch, first_row + source_row, first_column + column,
                      source_row < n_rows ? present : 0);
    };
    if (from.vectors) {
        FIVEDP_UNROLL
        for (int pass = 0; pass < rows / rows_a_pass; ++pass) copy(pass, true);
    } else {
        FIVEDP_NO_UNROLL
        for (int pass = 0; pass < rows / rows_a_pass; ++pass) copy(pass, false);
    }
}

// Where a lane finds its elements of a panel: those of rows 8 u .. of the warp's quarter, k from v * per_chunk.
template <class T>
struct FragmentPlace {
    int base, flip;
    bool along_k;

    FIVEDP_DEVICE FragmentPlace(int first, bool rows_along_k) : along_k(rows_along_k) {
        constexpr int item = sizeof(T), per = GemmTile<T>::per_chunk, width = GemmTile<T>::size * item;
        const int l = lane(), group = l / 4, pair = l % 4;
        if constexpr (item == 2) {
            // Of the four matrices of an ldmatrix, 1 and 3 are 8 rows on, 2 and 3 8 k on.
            base = along_k ? (l % 8 + l / 16 * 8) * width : (first + l % 16) * 128;
            flip = ((along_k ? (first / 8) ^ (l / 8 % 2) : l / 16) ^ (l % 8)) * 16;
        } else {
            base = along_k ? pair * width + group % per * item : (first + group) * 128 + pair % per * item;
            flip = (along_k ? (first / per) ^ (group / per) ^ swizzle<T, true>(pair)
                            : (pair / per) ^ swizzle<T, false>(group)) *
                   16;
        }
    }
    FIVEDP_DEVICE int offset(int u, int v) const {
        using Tile = GemmTile<T>;
        return base + (along_k ? v * Tile::per_chunk * Tile::size * Tile::item : u * 8 * 128) +
               ((along_k ? u * 8 * Tile::item : v * 16) ^ flip);
    }
};

// 16 rows of a panel as an operand of matrix instructions; for B, columns 0 to 7 have registers 0 and 2.
FIVEDP_DEVICE void load_16(std::uint32_t (&to)[4], const char* panel, const FragmentPlace<Half>& at, int i, int step) {
    warp_load_either(to, panel + at.offset(2 * i, 2 * step), at.along_k);
}

// A float in two parts of 11 bits.
FIVEDP_DEVICE void split(std::uint32_t& high, std::uint32_t& low, const char* at) {
    const float value = *reinterpret_cast<const float*>(at);
    high = as_tf32(value);
    low = as_tf32(value - bits_as_float(high));
}

// sums += the product of two panels.
template <class T>
FIVEDP_DEVICE void multiply_panels(GemmSums<T>& sums, const char* a_panel, const char* b_panel, bool a_along_k,
                                   bool b_along_k) {
    using Tile = GemmTile<T>;
    using Place = FragmentPlace<std::conditional_t<sizeof(T) == 2, Half, T>>;
    const Place a_place(warp() / 2 * Tile::of_warp, a_along_k), b_place(warp() % 2 * Tile::of_warp, b_along_k);
    // Steps are a loop: unrolled, the addresses of all of them would be kept in registers, which are full of sums.
    if constexpr (sizeof(T) == 2) {
        FIVEDP_NO_UNROLL
        for (int step = 0; step < Tile::depth / 16; ++step) {
            std::uint32_t a[Tile::row_tiles][4];
            FIVEDP_UNROLL
            for (int i = 0; i < Tile::row_tiles; ++i) load_16(a[i], a_panel, a_place, i, step);
            FIVEDP_UNROLL
            for (int j = 0; j < Tile::column_tiles / 2; ++j) {
                std::uint32_t b[4];
                load_16(b, b_panel, b_place, j, step);
                FIVEDP_UNROLL
                for (int i = 0; i < Tile::row_tiles; ++i) {
                    warp_multiply<T>(sums.at[i][2 * j], a[i], b[0], b[2]);
                    warp_multiply<T>(sums.at[i][2 * j + 1], a[i], b[1], b[3]);
                }
            }
        }
    } else if constexpr (sizeof(T) == 4) {
        FIVEDP_NO_UNROLL
        for (int step = 0; step < Tile::depth / 8; ++step) {
            std::uint32_t a_high[Tile::row_tiles][4], a_low[Tile::row_tiles][4];
            FIVEDP_UNROLL
            for (int i = 0; i < Tile::row_tiles; ++i) {
                FIVEDP_UNROLL
                for (int q = 0; q < 4; ++q)
                    split(a_high[i][q], a_low[i][q], a_panel + a_place.offset(2 * i + q % 2, 2 * step + q / 2));
            }
            FIVEDP_UNROLL
            for (int j = 0; j < Tile::column_tiles; ++j) {
                std::uint32_t b_high[2], b_low[2];
                FIVEDP_UNROLL
                for (int half = 0; half < 2; ++half)
                    split(b_high[half], b_low[half], b_panel + b_place.offset(j, 2 * step + half));
                FIVEDP_UNROLL
                for (int i = 0; i < Tile::row_tiles; ++i) {
                    float(&d)[4] = sums.at[i][j];
                    warp_multiply_tf32(d, a_low[i], b_high[0], b_high[1]);
                    warp_multiply_tf32(d, a_high[i], b_low[0], b_low[1]);
                    warp_multiply_tf32(d, a_high[i], b_high[0], b_high[1]);
                }
            }
        }
    } else {
        const auto value = [](const char* panel, const Place& at, int u, int step) {
            return *reinterpret_cast<const double*>(panel + at.offset(u, 2 * step));
        };
        FIVEDP_UNROLL
        for (int step = 0; step < Tile::depth / 4; ++step) {
            double a[2 * Tile::row_tiles];
            FIVEDP_UNROLL
            for (int i = 0; i < 2 * Tile::row_tiles; ++i) a[i] = value(a_panel, a_place, i, step);
            FIVEDP_UNROLL
            for (int j = 0; j < Tile::column_tiles; ++j) {
                const double b = value(b_panel, b_place, j, step);
                FIVEDP_UNROLL
                for (int i = 0; i < Tile::row_tiles; ++i) {
                    double(&d)[4] = sums.at[i][j];
                    warp_multiply_f64(d[0], d[1], a[2 * i], b);
                    warp_multiply_f64(d[2], d[3], a[2 * i + 1], b);
                }
            }
        }
    }
}

// sums = the product over all segments of a source, which has
//   n_segments(), k(i), merges(i), a(i), b(i), second() (a factor in turns with b, or null), origin, wait(i, k).
template <class T, class Source>
FIVEDP_DEVICE void sum_tile(GemmSums<T>& sums, Source& source, char* shared, TileOpenSums<T> open) {
    using Tile = GemmTile<T>;
    // Segment of the next copy, and where in it. Extents of k are counted in 31 bits, which saves registers.
    int ahead = 0, ahead_k = 0;
    const auto copy_next = [&](int stage) {
        while (ahead < source.n_segments() && ahead_k >= source.k(ahead)) ++ahead, ahead_k = 0;
        if (ahead < source.n_segments()) {
            const TileOrigin& origin = source.origin;
            source.wait(ahead, ahead_k);
            const int rest = static_cast<int>(source.k(ahead)) - ahead_k;
            const std::int64_t k = origin.k_first + ahead_k;
            const int n_k = rest < Tile::depth ? rest : Tile::depth;
            char* const to = shared + stage * Tile::stage_bytes;
            const GemmOperand &a = source.a(ahead), &b = source.b(ahead);
            if (a.rows_along_k)
                copy_panel<T, true>(to, a, nullptr, origin.a_batch, k, origin.a_first, n_k, origin.a_count);
            else
                copy_panel<T, false>(to, a, nullptr, origin.a_batch, origin.a_first, k, origin.a_count, n_k);
            if (b.rows_along_k)
                copy_panel<T, true>(to + Tile::panel_bytes, b, source.second(), origin.b_batch, k, origin.b_first, n_k,
                                    origin.b_count);
            else
                copy_panel<T, false>(to + Tile::panel_bytes, b, source.second(), origin.b_batch, origin.b_first, k,
                                     origin.b_count, n_k);
            ahead_k += Tile::depth;
        }
        commit_copies();
    };

    clear(sums);
    for (int stage = 0; stage < gemm_stages - 1; ++stage) copy_next(stage);
    int stage = 0;
    for (int segment = 0; segment < source.n_segments(); ++segment) {
        const bool a_along_k = source.a(segment).rows_along_k != 0, b_along_k = source.b(segment).rows_along_k != 0;
        FIVEDP_NO_UNROLL
        for (int k = static_cast<int>(source.k(segment)); k > 0; k -= Tile::depth) {
            wait_for_copies<gemm_stages - 2>();
            sync_block();  // this stage has come, and nobody reads the one before it any more
            copy_next(stage == 0 ? gemm_stages - 1 : stage - 1);
            const char* const panel = shared + stage * Tile::stage_bytes;
            multiply_panels<T>(sums, panel, panel + Tile::panel_bytes, a_along_k, b_along_k);
            stage = stage == gemm_stages - 1 ? 0 : stage + 1;
        }
        if (source.merges(segment) < 0) continue;
        for (int i = 0; i < source.merges(segment); ++i) open.add_last_to(&sums.at[0][0][0]);
        if (segment + 1 < source.n_segments()) {
            open.put(&sums.at[0][0][0]);
            clear(sums);
        }
    }
    sync_block();  // the next tile's copies overwrite what slower warps read
}

// A finished tile goes to global memory by way of shared memory, where a thread finds neighbours of a row: whole rows
// are written at once, by a short loop. 8 elements more a row put the lanes that write at a time in different banks.
template <class T>
constexpr int laid_pitch = GemmTile<T>::size + 8;

template <class T>
FIVEDP_DEVICE void lay_down(const GemmSums<T>& sums, char* shared) {
    using Tile = GemmTile<T>;
    struct alignas(2 * sizeof(Sum<T>)) Pair {
        Sum<T> first, second;
    };
    static_assert(Tile::size * laid_pitch<T> * static_cast<int>(sizeof(Sum<T>)) <= Tile::shared_bytes);
    const int row = warp() / 2 * Tile::of_warp + lane() / 4, column = warp() % 2 * Tile::of_warp + lane() % 4 * 2;
    Sum<T>* const to = reinterpret_cast<Sum<T>*>(shared) + row * laid_pitch<T> + column;
    FIVEDP_UNROLL
    for (int i = 0; i < Tile::row_tiles; ++i) FIVEDP_UNROLL
    for (int half = 0; half < 2; ++half) FIVEDP_UNROLL
    for (int j = 0; j < Tile::column_tiles; ++j)
        *reinterpret_cast<Pair*>(to + (16 * i + 8 * half) * laid_pitch<T> + 8 * j) = {sums.at[i][j][2 * half],
                                                                                      sums.at[i][j][2 * half + 1]};
    sync_block();
}

// Some neighbours of a row of the tile.
template <class T>
FIVEDP_DEVICE Vec16<Sum<T>> laid(const char* shared, int row, int column) {
    return *reinterpret_cast<const Vec16<Sum<T>>*>(reinterpret_cast<const Sum<T>*>(shared) + row * laid_pitch<T> +
                                                   column);
}

// Calls with(row, column, n) for every place of the tile where n neighbours of a row are to be written; n is less than
// that of Vec16<Sum<T>> at the right border. Afterwards shared memory is free.
template <class T, int columns, class With>
FIVEDP_DEVICE void for_laid(int n_rows, int n_columns, const With& with) {
    constexpr int per = Vec16<Sum<T>>::n, chunks = columns / per;
    FIVEDP_NO_UNROLL
    for (int i = thread(); i < n_rows * chunks; i += gemm_threads) {
        const int column = i % chunks * per, left = n_columns - column;
        if (left > 0) with(i / chunks, column, left < per ? left : per);
    }
    sync_block();
}

}  // namespace fivedp
