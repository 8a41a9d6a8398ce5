// What a core can multiply and add at most: a tile of sums in registers, and nothing to load or store.
//
// The tile is the microkernel's: as many independent sums as hide the latency. What a product reaches of this rate is
// its share of the peak.

// Operations done: two for every product of two numbers that is added.
template <class E>
FIVEDP_NOINLINE double multiply_adds(std::int64_t rounds) {
    using Acc = typename E::Acc;
    // Read one by one from memory of which the compiler may assume nothing: what it knew to be equal, it would add
    // once.
    volatile Acc start = 0;
    volatile typename E::Unit factor = 0;
    Vec<Acc> sums[tile_rows * tile_vectors];
#pragma GCC unroll 32
    for (Vec<Acc>& sum : sums) sum = broadcast<Acc>(start);
    const Vec<typename E::Unit> a = broadcast<typename E::Unit>(factor), b = broadcast<typename E::Unit>(factor);
    for (std::int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 32
        for (Vec<Acc>& sum : sums) E::accumulate(sum, a, b);
    Vec<Acc> total = {};
#pragma GCC unroll 32
    for (const Vec<Acc>& sum : sums) total = total + sum;
    volatile Acc kept = total[0];
    (void)kept;
    return 2.0 * E::unit_k * tile_rows * tile_vectors * lanes<Acc> * (double)rounds;
}
