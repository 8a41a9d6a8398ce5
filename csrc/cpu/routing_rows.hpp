// Rows of numbers in whole blocks of lanes: exponentials, logarithms, sums and maxima, in the same order on every
// instruction set.

// x < y ? x : y, lane by lane.
template <class T>
FIVEDP_INLINE Vec<T> smaller(Vec<T> x, Vec<T> y) {
    return x < y ? x : y;
}

// The lanes in which x >= y, as bits.
template <class T>
FIVEDP_INLINE std::uint32_t lanes_at_least(Vec<T> x, Vec<T> y) {
#if FIVEDP_VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GE_OQ);
    if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask((__m512d)x, (__m512d)y, _CMP_GE_OQ);
#elif FIVEDP_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4)
        return (std::uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)y, _CMP_GE_OQ));
    if constexpr (sizeof(T) == 8)
        return (std::uint32_t)_mm256_movemask_pd(_mm256_cmp_pd((__m256d)x, (__m256d)y, _CMP_GE_OQ));
#else
    std::uint32_t bits = 0;
    for (int lane = 0; lane < lanes<T>; ++lane) bits |= (std::uint32_t)(x[lane] >= y[lane]) << lane;
    return bits;
#endif
}

// exp(x) for x <= 0; 0 below the smallest normal number. 2^t with t = x / log(2) rounded, times 1 + what was rounded
// off.
template <class T>
FIVEDP_INLINE Vec<T> exp_of(Vec<T> x) {
    const Vec<T> high = broadcast<T>(T(1.4426950408889634074));
    const Vec<T> low = broadcast<T>(sizeof(T) == 4 ? T(1.9259629911266175e-8) : T(2.0355273740931033e-17));
    x = larger<T>(x, broadcast<T>(T(-10000)));  // minus infinity has no rounding error to speak of
    const Vec<T> t = x * high;
    const Vec<T> rest = fused(x, low, fused(x, high, -t));
    const Vec<T> power = exp2<T>(t);
    return fused(power * rest, broadcast<T>(T(0.69314718055994530942)), power);
}

// log(x) for x >= 1: with x = 2^n m, m from sqrt(1/2) to sqrt(2), n log(2) + 2 artanh((m - 1) / (m + 1)).
FIVEDP_INLINE double log_of(double x) {
    std::int64_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    double n = (double)((bits >> 52) - 1023);
    bits = (bits & 0xfffffffffffff) | 0x3ff0000000000000;
    double m;
    __builtin_memcpy(&m, &bits, sizeof m);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        n += 1;
    }
    const double s = (m - 1) / (m + 1), square = s * s;
    double sum = 0;  // of square^i / (2 i + 1), i from 1
#pragma GCC unroll 11
    for (int i = 11; i >= 1; --i) sum = (sum + 1.0 / (2 * i + 1)) * square;
    return n * 0.69314718055994530942 + (2 * s + 2 * s * sum);
}

// Calls work(i) for every vector of a row of n elements, n a multiple of the lanes of sums.
template <class T, class Work>
FIVEDP_INLINE void each_vector(std::int64_t n, const Work& work) {
    for (std::int64_t i = 0; i < n; i += lanes<T>) work(i);
}

// The sum over i of term(i), the vector at element i of a row.
template <class T, class Term>
FIVEDP_INLINE T row_sum(std::int64_t n, const Term& term) {
    constexpr int parts = 64 / FIVEDP_VECTOR_BYTES;
    Vec<T> sums[parts] = {};
    for (std::int64_t i = 0; i < n; i += routing_lanes<T>)
        for (int part = 0; part < parts; ++part) sums[part] = sums[part] + term(i + part * lanes<T>);
    T lane[routing_lanes<T>];
    __builtin_memcpy(lane, sums, sizeof lane);
    for (std::int64_t half = routing_lanes<T> / 2; half > 0; half /= 2)
        for (std::int64_t i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
    return lane[0];
}

template <class T>
FIVEDP_INLINE T highest_lane(Vec<T> x) {
    T lane[lanes<T>];
    store(lane, x);
#pragma GCC unroll 4
    for (int half = lanes<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}

template <class T>
FIVEDP_INLINE T row_max(const T* row, std::int64_t n) {
    Vec<T> highest = load<Vec<T>>(row);
    each_vector<T>(n, [&](std::int64_t i) { highest = larger<T>(load<Vec<T>>(row + i), highest); });
    return highest_lane<T>(highest);
}

// Writes exp(z - highest) of a row that is filled up with minus infinity, and returns the sum.
template <class T>
FIVEDP_INLINE T exponentials(const T* z, std::int64_t n, T highest, T* to) {
    return row_sum<T>(n, [&](std::int64_t i) {
        const Vec<T> value = exp_of<T>(load<Vec<T>>(z + i) - broadcast<T>(highest));
        store(to + i, value);
        return value;
    });
}

template <class T>
static constexpr T no_number = T(-__builtin_inf());

static constexpr std::int64_t whole_blocks(std::int64_t n, std::int64_t block) {
    return (n + block - 1) / block * block;
}
