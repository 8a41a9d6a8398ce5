// The innermost loop: a tile of C, rows x vectors, summed over one chain in registers.
//
//     tile = 0;  for k: tile += A[:, k] (outer product) B[k, :];  tile += open subtrees;  store
//
// A lies as rows along k (so a row-major A is packed by copying), B as one panel of 1 .. tile_vectors vectors per k.
// Each element is one chain of fused multiply-adds in increasing k that starts from +0, in every instruction set.
// An engine says what a packed unit is: a number, or a pair of bfloat16 that one instruction multiplies and adds.

static constexpr int tile_vectors = FIVEDP_TILE_VECTORS;
static constexpr int tile_rows = FIVEDP_TILE_ROWS;

struct F32Engine {
    using Source = float;
    using Unit = float;
    using Acc = float;
    static constexpr int unit_k = 1;
    FIVEDP_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> acc) { return fused(a, b, acc); }
    FIVEDP_INLINE void accumulate(Vec<float>& sum, Vec<float> a, Vec<float> b) { fuse_into(sum, a, b); }
};

struct F64Engine {
    using Source = double;
    using Unit = double;
    using Acc = double;
    static constexpr int unit_k = 1;
    FIVEDP_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> acc) { return fused(a, b, acc); }
    FIVEDP_INLINE void accumulate(Vec<double>& sum, Vec<double> a, Vec<double> b) { fuse_into(sum, a, b); }
};

// bfloat16 widened to float while packing.
struct Bf16WidenedEngine : F32Engine {
    using Source = std::uint16_t;
};

#ifdef FIVEDP_BF16_PAIRS
// Pairs (k, k + 1) counted from the start of the chain; an odd end is filled with zero.
struct Bf16PairsEngine {
    using Source = std::uint16_t;
    using Unit = std::uint32_t;
    using Acc = float;
    static constexpr int unit_k = 2;
    FIVEDP_INLINE Vec<float> multiply_add(Vec<std::uint32_t> a, Vec<std::uint32_t> b, Vec<float> acc) {
#ifdef __AVX512BF16__
        return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
        // What the instruction does: the upper product first, then the lower, each fused (denormals aside).
        const Vec<float> upper = fused((Vec<float>)(a & 0xffff0000u), (Vec<float>)(b & 0xffff0000u), acc);
        return fused((Vec<float>)(a << 16), (Vec<float>)(b << 16), upper);
#endif
    }
    FIVEDP_INLINE void accumulate(Vec<float>& sum, Vec<std::uint32_t> a, Vec<std::uint32_t> b) {
        sum = multiply_add(a, b, sum);
    }
};
#endif

template <class Acc>
static constexpr int tile_columns = tile_vectors* lanes<Acc>;

// Units of a packed row of A or panel of B, full or not.
template <class E>
static constexpr int pass_units = static_cast<int>(FIVEDP_PASS_K) / E::unit_k;

// The tiles to add to a chain's sum, in this order.
template <class Acc>
struct OpenSums {
    int count;
    const Acc* tile[max_tree_depth + 2];
};

// Lines of memory to fetch into the L2 cache while a chain is summed, two for every four k, or more where few tiles
// have much to fetch: all at once they would keep the packed operands from the L1 cache until the last of them has
// come.
struct FetchList {
    struct Run {
        const char* first;
        std::int64_t stride, count;
    };
    static constexpr int most_runs = 32, few_lines = 9, most_pairs = 3;
    int n_runs;
    int pairs;          // of lines, for every four k
    std::int64_t room;  // lines for which there is time
    Run runs[most_runs];
};

FIVEDP_INLINE void clear(FetchList& list, std::int64_t units, int pairs) {
    list.n_runs = 0;
    list.pairs = pairs;
    list.room = units / 4 * 2 * pairs;
}

// Returns how many lines there was room for. A few lines are fetched at once: a run of its own would cost more.
FIVEDP_INLINE std::int64_t add_run(FetchList& list, const void* first, std::int64_t stride, std::int64_t count) {
    if (count > list.room) count = list.room;
    if (count <= FetchList::few_lines) {
        for (std::int64_t i = 0; i < count; ++i) __builtin_prefetch((const char*)first + i * stride, 0, 2);
        return count > 0 ? count : 0;
    }
    if (list.n_runs == FetchList::most_runs) return 0;
    list.runs[list.n_runs++] = {(const char*)first, stride, count};
    list.room -= count;
    return count;
}

// Where a sum goes: a slot, whose rows lie close together, or C itself.
struct SumTarget {
    char* first;
    std::int64_t row_stride;  // bytes
};

template <class E, int rows, int vectors>
FIVEDP_NOINLINE void microkernel(const typename E::Unit* __restrict__ a, const typename E::Unit* __restrict__ b,
                                 std::int64_t units, const OpenSums<typename E::Acc>& open, const FetchList& fetches,
                                 SumTarget to) {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    using V = Vec<Acc>;
    constexpr int width = lanes<Acc>;

    V sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[r][v] = V{};

    const auto step = [&](std::int64_t k) __attribute__((always_inline)) {
        Vec<Unit> b_row[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) b_row[v] = load<Vec<Unit>>(b + (k * vectors + v) * width);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            const Vec<Unit> a_rk = broadcast<Unit>(a[r * pass_units<E> + k]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) E::accumulate(sum[r][v], a_rk, b_row[v]);
        }
    };
    std::int64_t k = 0;
    for (int i = 0; i < fetches.n_runs; ++i) {
        const char* line = fetches.runs[i].first;
        const std::int64_t stride = fetches.runs[i].stride;
        for (std::int64_t left = fetches.runs[i].count; left > 0 && k + 4 <= units; left -= 2 * fetches.pairs, k += 4) {
            for (int pair = 0; pair < fetches.pairs; ++pair, line += 2 * stride) {
                __builtin_prefetch(line, 0, 2);
                __builtin_prefetch(line + stride, 0, 2);
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) step(k + j);
        }
    }
    for (; k + 4 <= units; k += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) step(k + j);
    for (; k < units; ++k) step(k);

    for (int i = 0; i < open.count; ++i) {
        const Acc* other = open.tile[i];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[r][v] = load<V>(other + (r * vectors + v) * width) + sum[r][v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(to.first + r * to.row_stride + v * FIVEDP_VECTOR_BYTES, sum[r][v]);
}

template <class E>
using Microkernel = void (*)(const typename E::Unit*, const typename E::Unit*, std::int64_t,
                             const OpenSums<typename E::Acc>&, const FetchList&, SumTarget);

// The microkernel for a tile of 1 .. tile_rows rows, found by halving so that no table with dynamic start is needed.
template <class E, int vectors, int low = 1, int high = tile_rows>
FIVEDP_INLINE Microkernel<E> microkernel_of_rows(int rows) {
    if constexpr (low == high) {
        return &microkernel<E, low, vectors>;
    } else {
        constexpr int middle = (low + high) / 2;
        return rows <= middle ? microkernel_of_rows<E, vectors, low, middle>(rows)
                              : microkernel_of_rows<E, vectors, middle + 1, high>(rows);
    }
}

template <class E, int most = tile_vectors>
FIVEDP_INLINE Microkernel<E> microkernel_for(int rows, int vectors) {
    if constexpr (most > 1)
        if (vectors < most) return microkernel_for<E, most - 1>(rows, vectors);
    return microkernel_of_rows<E, most>(rows);
}
