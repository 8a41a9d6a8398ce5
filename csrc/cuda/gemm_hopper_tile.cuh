// The main loop of products of 16-bit types for compute capability 9.x: one block of threads makes one tile of C, in
// the order of gemm_tile.cuh: virtual shards as chains in rising k, in blocks of one matrix instruction (16 k) counted
// from the shard's start, the last 64 filled up with zeros; shards in the binary tree.
//
// Tile: 128 x 256; a stage has 64 k of both factors, 48 KiB, and there are 4 stages. Warps:
//
// - two warpgroups multiply, 64 rows each: wgmma m64n256k16, both factors from shared memory, 128 sums a thread. One
//   that has no row of the tile only counts along.
// - four warps bring the factors. A factor comes in halves of 128 rows of A or columns of B, each as boxes of the copy
//   engine (TMA) where that can be told of its array, else through these warps' registers and cp.async to the same
//   places: rows that a table names, rows that do not begin at multiples of 16 bytes, and the last k of a group of rows
//   whose end only the device knows, behind which zeros have to follow, not the next group. So neither an address nor
//   a stride changes a bit. With a gate, the second half of B are columns of the other
//   weights: a thread has gate and up of an element in sums j and j + 16.
//
// Either factor may have its elements contiguous along k or along the other index; a half is one box of 128 rows of 64
// k, or two panels of 64 rows of k, both swizzled by 128 bytes (hopper.cuh), and wgmma reads both. Each of the four
// cases is a kernel of its own, since the instruction says which it is, and the compiler lets no products overlap whose
// sums come from several places. Segments that lie another way round than the longest one are copied element by
// element.
//
// Barriers of a stage: `landed` when all four copying warps have arrived and the bytes of the boxes are there, `free`
// when the eight multiplying warps are done with it. A warp that copies itself arrives two blocks later, when its
// copies are there, or before it waits for a flag that is not raised yet. Copying goes on with the next tile while sums
// are stored. 192 KiB of stages and 20 KiB through which sums become rows: one block a multiprocessor. For a tile 2 *
// 128 * 256 * k FLOPs and (128 + 256) * k elements read.
#pragma once

#include <utility>

#include "cuda/hopper.cuh"
#include "cuda/product_tile.cuh"

namespace fivedp {

constexpr int product_rows = 128, product_columns = 256, product_depth = 64, product_stages = 4;
constexpr int multiplying_warps = 8, bringing_warps = 4, product_threads = 32 * (multiplying_warps + bringing_warps);
constexpr int bringing_threads = 32 * bringing_warps;
// 2 x 216 + 72 registers of 128 threads are what 12 warps with 168 each have.
constexpr int multiplying_registers = 216, bringing_registers = 72;
constexpr int half_extent = 128, half_bytes = half_extent * 128, panel_bytes = half_bytes / 2;
constexpr int copies_behind = 2;  // blocks of k whose copies may be under way; less than there are stages

static_assert(product_depth == gemm_depth(DeviceType::bf16));

// 8 more than a slice of 32 columns: lanes that write pairs meet in no bank.
constexpr int slice_pitch = 40;

struct ProductShared {
    char a[product_stages][half_bytes], b[product_stages][2 * half_bytes];
    float slices[multiplying_warps][16 * slice_pitch];
    Barrier landed[product_stages], free[product_stages];
};

using ProductSums = float[product_columns / 8][4];
using ProductOpenSums = OpenSums<float, product_columns / 2, 32 * multiplying_warps>;
using ProductTurn = Turn<product_stages>;

// What the copy engine is told of the factors of each segment, where it can be (bit i for segment i).
template <int segments>
struct ProductBoxes {
    TensorMap a[segments], b[segments], second;
    std::uint32_t a_boxed, b_boxed, second_boxed;
};

// The factor up to `k` of the part that begins at `of.data`; false where it has to be copied otherwise.
inline bool box_of(DeviceType type, const GemmOperand& of, std::int64_t outer, std::int64_t k, std::int64_t batch,
                   TensorMap& to) {
    if (of.rows != nullptr) return false;
    const bool along_k = of.rows_along_k != 0;
    const std::int64_t rows = along_k ? of.k_before + k : outer, columns = along_k ? outer : of.k_before + k;
    const std::int64_t batches = of.batch_stride != 0 ? batch : 1;
    BoxedTensor tensor{type,    of.data - of.k_before * (along_k ? of.row_stride : of.column_stride),
                       columns, {rows, batches, 1},
                       {},      along_k ? product_depth : half_extent};
    const std::int64_t any_step = (2 * columns + 15) / 16 * 16;
    tensor.steps[0] = rows > 1 ? of.row_stride : any_step;
    tensor.steps[1] = batches > 1 ? of.batch_stride : any_step;
    tensor.steps[2] = any_step;
    bool fits = reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0 && (columns <= 1 || of.column_stride == 2) &&
                tensor.steps[0] >= 2 * columns;
    for (const std::int64_t count : {rows, columns, batches})
        fits = fits && count >= 1 && count < std::int64_t{1} << 31;  // coordinates are int
    for (const std::int64_t step : tensor.steps)
        fits = fits && step > 0 && step % 16 == 0 && step < std::int64_t{1} << 40;
    if (fits) to = tensor_map(tensor);
    return fits;
}

// Whether the rows of the longest segment of a factor are k; all are turned so, with elements that are then copied one
// by one. `count` of them, operand(i) and extent(i).
template <class Operand, class Extent>
bool turn_alike(int count, const Operand& operand, const Extent& extent) {
    int longest = 0;
    for (int i = 1; i < count; ++i)
        if (extent(i) > extent(longest)) longest = i;
    const int along_k = operand(longest).rows_along_k;
    for (int i = 0; i < count; ++i) {
        GemmOperand& of = operand(i);
        if (of.rows_along_k == along_k) continue;
        std::swap(of.row_stride, of.column_stride);
        of.rows_along_k = along_k;
        of.vectors = 0;
    }
    return along_k != 0;
}

// By all threads of the block, at the kernel's start.
FIVEDP_DEVICE void open_product_barriers() {
    if (thread() == 0) {
        ProductShared& shared = shared_from_boundary<ProductShared>();
        for (int stage = 0; stage < product_stages; ++stage) {
            init_barrier(&shared.landed[stage], bringing_warps);
            init_barrier(&shared.free[stage], multiplying_warps);
        }
        publish_barriers();
    }
    sync_block();
}

// Half a factor, by all bringing threads: `n_rows` and `n_columns` of it are there, zeros follow.
template <class T, bool along_k>
FIVEDP_DEVICE void copy_half(char* to, const GemmOperand& from, std::int64_t batch, std::int64_t first_row,
                             std::int64_t first_column, int n_rows, int n_columns) {
    constexpr int rows = along_k ? product_depth : half_extent, chunks = along_k ? 16 : 8;
    constexpr int rows_a_pass = bringing_threads / chunks;
    const int me = computed_here(thread()) % bringing_threads, chunk = me % chunks, left = n_columns - 8 * chunk;
    const int present = left < 0 ? 0 : left > 8 ? 8 : left;
    const auto copy = [&](int row, bool vectors) {
        copy_chunk<T>(to + chunk / 8 * panel_bytes + row * 128 + ((chunk ^ row) % 8) * 16, from, vectors, batch,
                      first_row + row, first_column + 8 * chunk, row < n_rows ? present : 0);
    };
    if (from.vectors) {
        FIVEDP_NO_UNROLL
        for (int row = me / chunks; row < rows; row += rows_a_pass) copy(row, true);
    } else {
        FIVEDP_NO_UNROLL
        for (int row = me / chunks; row < rows; row += rows_a_pass) copy(row, false);
    }
}

// The state of a warp that brings factors. In `owed`, bit i is set where it has not yet arrived for the block before
// the last i.
struct Bringing {
    ProductTurn turn;
    std::uint32_t owed = 0;

    // Arrives for the block that was brought `ago` before the one that comes next, whose copies are there.
    FIVEDP_DEVICE void arrive_for(ProductShared& shared, int ago) const {
        publish_to_products();
        warp_sync();
        if (lane() == 0) arrive(&shared.landed[(turn.stage + product_stages - ago) % product_stages]);
    }
    // Arrives for all blocks so far: after the last tile, and before a wait for something that other blocks of threads
    // or the host do, who may want to see the products of these first.
    FIVEDP_DEVICE void arrive_for_all() {
        wait_for_copies<0>();
        for (int ago = copies_behind; ago > 0; --ago)
            if (owed >> (ago - 1) & 1) arrive_for(shared_from_boundary<ProductShared>(), ago);
        owed = 0;
    }
};

// Brings a tile's factors; `me` is the number of this warp among those that do. A source has, beyond what gemm_tile.cuh
// says of it, waits(): whether wait() waits for flags; ends_with_arrays(): whether nothing follows the last k of a
// segment in what ProductBoxes say of it.
template <class T, bool a_along_k, bool b_along_k, class Source, class Boxes>
FIVEDP_DEVICE void bring_tile(Bringing& state, Source& source, const Boxes& boxes, int me) {
    ProductShared& shared = shared_from_boundary<ProductShared>();
    const TileOrigin& at = source.origin;
    const GemmOperand* const second = source.second();
    const int segments = source.n_segments();
    FIVEDP_NO_UNROLL
    for (int segment = 0; segment < segments; ++segment) {
        const int all = static_cast<int>(source.k(segment));
        FIVEDP_NO_UNROLL
        for (int k = 0; k < all; k += product_depth) {
            const int stage = state.turn.stage, n_k = all - k < product_depth ? all - k : product_depth;
            Barrier* const landed = &shared.landed[stage];
            wait_for_phase(&shared.free[stage], state.turn.parity ^ 1);
            source.wait(segment, k, [&] { state.arrive_for_all(); });
            if (source.waits()) show_to_boxes();
            const bool whole = n_k == product_depth || source.ends_with_arrays();
            bool copied = false;
            FIVEDP_NO_UNROLL
            for (int half = 0; half < 3; ++half) {
                const bool other = half == 2 && second != nullptr;
                const GemmOperand& from = half == 0 ? source.a(segment) : other ? *second : source.b(segment);
                const TensorMap* const map = half == 0 ? &boxes.a[segment] : other ? &boxes.second : &boxes.b[segment];
                const bool boxed = other       ? boxes.second_boxed != 0
                                   : half == 0 ? (boxes.a_boxed >> segment & 1) != 0
                                               : (boxes.b_boxed >> segment & 1) != 0;
                const int skipped = half == 2 && !other ? half_extent : 0;
                const std::int64_t first = half == 0 ? at.a_first : at.b_first + skipped;
                const std::int64_t batch = half == 0 ? at.a_batch : at.b_batch;
                const int left = half == 0 ? at.a_count : at.b_count - skipped;
                if (left <= 0) continue;  // what lies there makes sums that nobody stores
                char* const to = half == 0 ? shared.a[stage] : shared.b[stage] + (half - 1) * half_bytes;
                const std::int64_t first_k = at.k_first + k;
                if (boxed && whole) {
                    if (me > 0 || lane() > 0) continue;
                    const int outer = static_cast<int>(first), along = static_cast<int>(from.k_before + first_k);
                    const int matrix = from.batch_stride != 0 ? static_cast<int>(batch) : 0;
                    expect_bytes(landed, half_bytes);
                    if (half == 0 ? a_along_k : b_along_k) {
                        copy_box(to, map, landed, outer, along, matrix, 0);
                        copy_box(to + panel_bytes, map, landed, outer + panel_columns, along, matrix, 0);
                    } else {
                        copy_box(to, map, landed, along, outer, matrix, 0);
                    }
                    continue;
                }
                copied = true;
                const int count = left < half_extent ? left : half_extent;
                if (half == 0 ? a_along_k : b_along_k)
                    copy_half<T, true>(to, from, batch, first_k, first, n_k, count);
                else
                    copy_half<T, false>(to, from, batch, first, first_k, count, n_k);
            }
            commit_copies();
            if (!copied && lane() == 0) arrive(landed);
            state.turn.next();
            state.owed = state.owed << 1 | static_cast<std::uint32_t>(copied);
            wait_for_copies<copies_behind>();
            if (state.owed >> copies_behind & 1) state.arrive_for(shared, copies_behind + 1);
        }
    }
}

// sums = (or, with `add`, +=) the product of some blocks of k.
template <class T, bool a_along_k, bool b_along_k>
FIVEDP_DEVICE void multiply_blocks(ProductSums& sums, ProductTurn& turn, ProductShared& shared, int group, int blocks,
                                   bool add) {
    int before = -1;  // the stage that products still read
    settle(sums);
    FIVEDP_NO_UNROLL
    for (; blocks > 0; --blocks) {
        wait_for_phase(&shared.landed[turn.stage], turn.parity);
        const std::uint64_t a = swizzled_matrix(shared.a[turn.stage] + group * panel_bytes, swizzle_bytes, panel_bytes);
        const std::uint64_t b = swizzled_matrix(shared.b[turn.stage], swizzle_bytes, panel_bytes);
        settle(sums);
        open_products();
        FIVEDP_UNROLL
        for (int i = 0; i < product_depth / 16; ++i)
            start_product<a_along_k, b_along_k>(T{}, sums, further(a, i * (a_along_k ? 16 * 128 : 32)),
                                                further(b, i * (b_along_k ? 16 * 128 : 32)), add || i > 0);
        commit_products();
        wait_for_products<1>();
        settle(sums);
        if (before >= 0 && lane() == 0) arrive(&shared.free[before]);
        before = turn.stage;
        add = true;
        turn.next();
    }
    wait_for_products<0>();
    settle(sums);
    if (before >= 0 && lane() == 0) arrive(&shared.free[before]);
}

// sums = the product over all segments of a source, for 64 rows of the tile.
template <class T, bool a_along_k, bool b_along_k, class Source>
FIVEDP_DEVICE void multiply_tile(ProductSums& sums, ProductTurn& turn, const Source& source, int group,
                                 ProductOpenSums open) {
    ProductShared& shared = shared_from_boundary<ProductShared>();
    const int segments = source.n_segments();
    const bool idle = 64 * group >= source.origin.a_count;
    bool add = false;
    FIVEDP_NO_UNROLL
    for (int segment = 0; segment < segments; ++segment) {
        const int blocks = (static_cast<int>(source.k(segment)) + product_depth - 1) / product_depth;
        if (idle) {
            FIVEDP_NO_UNROLL
            for (int i = 0; i < blocks; ++i, turn.next()) {
                wait_for_phase(&shared.landed[turn.stage], turn.parity);
                if (lane() == 0) arrive(&shared.free[turn.stage]);
            }
            continue;
        }
        multiply_blocks<T, a_along_k, b_along_k>(sums, turn, shared, group, blocks, add);
        add = add || blocks > 0;
        const bool last = segment + 1 == segments;
        if (source.merges(segment) < 0 && !last) continue;
        if (!add) {
            FIVEDP_UNROLL
            for (auto& four : sums)
                for (float& sum : four) sum = 0;
        }
        for (int i = 0; i < source.merges(segment); ++i) open.add_last_to(sums[0]);
        if (last) continue;
        open.put(sums[0]);
        add = false;
    }
}

// Calls with(row, column, n, sums, second sums) for every place where n neighbours of a row of the tile are to be
// written; n is less than 4 at the right border. Sums go by way of shared memory, 16 rows of 32 columns of a warp at a
// time, so that whole sectors are written. With `pairs` a slice is 16 columns of the first half of the tile and the
// same of the second; without, second sums mean nothing.
template <bool pairs, class With>
FIVEDP_DEVICE void for_slices(const ProductSums& sums, int n_rows, int n_columns, const With& with) {
    constexpr int width = pairs ? 16 : 32, lanes = width / 4, rows_a_pass = 32 / lanes;
    const int me = computed_here(thread()), l = me % 32, first_row = me / 32 * 16;
    float* const slice = shared_from_boundary<ProductShared>().slices[me / 32];
    float* const to = slice + l / 4 * slice_pitch + l % 4 * 2;
    struct alignas(8) Pair {
        float first, second;
    };
    FIVEDP_NO_UNROLL
    for (int s = 0; s * width < n_columns; ++s) {
        // Which sums these are has to be known to the compiler.
        FIVEDP_UNROLL
        for (int known = 0; known < 8; ++known) {
            if (s != known) continue;
            FIVEDP_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int j = pairs ? 2 * known + i % 2 + i / 2 * 16 : 4 * known + i;
                FIVEDP_UNROLL
                for (int r = 0; r < 2; ++r)
                    *reinterpret_cast<Pair*>(to + 8 * r * slice_pitch + 8 * i) = {sums[j][2 * r], sums[j][2 * r + 1]};
            }
        }
        warp_sync();
        const int column = s * width + l % lanes * 4, left = n_columns - column;
        FIVEDP_NO_UNROLL
        for (int row = l / lanes; row < 16; row += rows_a_pass) {
            if (left <= 0 || first_row + row >= n_rows) continue;
            const float* const from = slice + row * slice_pitch + l % lanes * 4;
            const Vec16<float> first = *reinterpret_cast<const Vec16<float>*>(from);
            const Vec16<float> second = pairs ? *reinterpret_cast<const Vec16<float>*>(from + 16) : first;
            with(first_row + row, column, left < 4 ? left : 4, first, second);
        }
        warp_sync();
    }
}

constexpr std::int64_t product_shared_bytes = sizeof(ProductShared) + swizzle_bytes;

}  // namespace fivedp
