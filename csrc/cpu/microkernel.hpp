// The innermost loop: a tile of C, `rows` x (2 vectors), summed over one chain in registers.
//
//     tile = 0;  for k: tile += A[:, k] (outer product) B[k, :];  tile += open subtrees;  store
//
// A lies as rows along k (so a row-major A is packed by copying), B as one panel of 2 vectors per k.
// Each element is one chain of fused multiply-adds in increasing k that starts from +0, in every instruction set.
// An engine says what a packed unit is: a number, or a pair of bfloat16 that one instruction multiplies and adds.

// Tile of 2 vectors x FIVEDP_TILE_ROWS.
static constexpr int tile_vectors = 2;
static constexpr int tile_rows = FIVEDP_TILE_ROWS;

struct F32Engine {
    using Source = float;
    using Unit = float;
    using Acc = float;
    static constexpr int unit_k = 1;
    FIVEDP_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> acc) { return fused(a, b, acc); }
};

struct F64Engine {
    using Source = double;
    using Unit = double;
    using Acc = double;
    static constexpr int unit_k = 1;
    FIVEDP_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> acc) { return fused(a, b, acc); }
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
};
#endif

template <class Acc>
static constexpr int tile_columns = tile_vectors* lanes<Acc>;

// Units of a packed row of A or panel of B, full or not.
template <class E>
static constexpr int pass_units = static_cast<int>(FIVEDP_PASS_K) / E::unit_k;

// The tiles to add to a chain's sum, in this order. A slot in scratch holds all tiles one after the other, a local
// slot only the current one (mask 0).
template <class Acc>
struct OpenSums {
    int count;
    const Acc* slot[max_tree_depth + 2];
    std::int64_t mask[max_tree_depth + 2];
};

template <class E, int rows>
FIVEDP_NOINLINE void microkernel(const typename E::Unit* __restrict__ a, const typename E::Unit* __restrict__ b,
                                 std::int64_t units, const OpenSums<typename E::Acc>& open, std::int64_t offset,
                                 typename E::Acc* to) {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    using V = Vec<Acc>;
    constexpr int width = lanes<Acc>;

    for (int i = 0; i < open.count; ++i)
        for (int line = 0; line < rows * tile_columns<Acc> * (int)sizeof(Acc); line += 64)
            __builtin_prefetch((const char*)(open.slot[i] + (offset & open.mask[i])) + line);

    for (int line = 0; line < rows * tile_columns<Acc> * (int)sizeof(Acc); line += 64)
        __builtin_prefetch((const char*)to + line, 1);

    V sum[rows][tile_vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v) sum[r][v] = V{};

#pragma GCC unroll 4
    for (std::int64_t k = 0; k < units; ++k) {
        Vec<Unit> b_row[tile_vectors];
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v) b_row[v] = load<Vec<Unit>>(b + k * tile_columns<Acc> + v * width);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            const Vec<Unit> a_rk = broadcast<Unit>(a[r * pass_units<E> + k]);
#pragma GCC unroll 4
            for (int v = 0; v < tile_vectors; ++v) sum[r][v] = E::multiply_add(a_rk, b_row[v], sum[r][v]);
        }
    }

    for (int i = 0; i < open.count; ++i) {
        const Acc* from = open.slot[i] + (offset & open.mask[i]);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < tile_vectors; ++v)
                sum[r][v] = load<V>(from + r * tile_columns<Acc> + v * width) + sum[r][v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < tile_vectors; ++v) store(to + r * tile_columns<Acc> + v * width, sum[r][v]);
}

template <class E>
using Microkernel = void (*)(const typename E::Unit*, const typename E::Unit*, std::int64_t,
                             const OpenSums<typename E::Acc>&, std::int64_t, typename E::Acc*);

// The microkernel for a tile of 1 .. tile_rows rows, found by halving so that no table with dynamic start is needed.
template <class E, int low = 1, int high = tile_rows>
FIVEDP_INLINE Microkernel<E> microkernel_for(int rows) {
    if constexpr (low == high) {
        return &microkernel<E, low>;
    } else {
        constexpr int middle = (low + high) / 2;
        return rows <= middle ? microkernel_for<E, low, middle>(rows) : microkernel_for<E, middle + 1, high>(rows);
    }
}
