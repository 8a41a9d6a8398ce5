// Vectors of one instruction set: load, store, broadcast, fused multiply-add, transpose.
//
// Included inside the instruction set's own namespace, with FIVEDP_VECTOR_BYTES set. GCC and Clang vector extensions
// carry the arithmetic; the fused multiply-add is spelled per instruction set, because the promise on bits rests on it
// and a compiler is free not to contract a product and a sum.

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(FIVEDP_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
static constexpr int lanes = FIVEDP_VECTOR_BYTES / sizeof(T);

#define FIVEDP_INLINE static inline __attribute__((always_inline))
#define FIVEDP_NOINLINE static __attribute__((noinline))

template <class V>
FIVEDP_INLINE V load(const void* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

template <class V>
FIVEDP_INLINE void store(void* to, const V& value) {
    __builtin_memcpy(to, &value, sizeof value);
}

template <class T>
FIVEDP_INLINE Vec<T> broadcast(T value) {
    return value - Vec<T>{};  // x - 0 is x, -0 included: the compiler makes it one broadcast
}

// fused: acc + a * b with one rounding
#if FIVEDP_VECTOR_BYTES == 64 && defined(__AVX512F__)
FIVEDP_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> acc) {
    return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
}
FIVEDP_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> acc) {
    return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)acc);
}
#elif FIVEDP_VECTOR_BYTES == 64  // emulated: two halves
FIVEDP_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> acc) {
    Vec<float> result;
    for (int half = 0; half < 2; ++half) {
        const __m256 x = _mm256_loadu_ps((const float*)&a + 8 * half), y = _mm256_loadu_ps((const float*)&b + 8 * half);
        _mm256_storeu_ps((float*)&result + 8 * half,
                         _mm256_fmadd_ps(x, y, _mm256_loadu_ps((const float*)&acc + 8 * half)));
    }
    return result;
}
FIVEDP_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> acc) {
    Vec<double> result;
    for (int half = 0; half < 2; ++half) {
        const __m256d x = _mm256_loadu_pd((const double*)&a + 4 * half),
                      y = _mm256_loadu_pd((const double*)&b + 4 * half);
        _mm256_storeu_pd((double*)&result + 4 * half,
                         _mm256_fmadd_pd(x, y, _mm256_loadu_pd((const double*)&acc + 4 * half)));
    }
    return result;
}
#elif FIVEDP_VECTOR_BYTES == 32
FIVEDP_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> acc) {
    return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc);
}
FIVEDP_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> acc) {
    return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)acc);
}
#else
FIVEDP_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> acc) {
    Vec<float> result;
    for (int lane = 0; lane < lanes<float>; ++lane) result[lane] = __builtin_fmaf(a[lane], b[lane], acc[lane]);
    return result;
}
FIVEDP_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> acc) {
    Vec<double> result;
    for (int lane = 0; lane < lanes<double>; ++lane) result[lane] = __builtin_fma(a[lane], b[lane], acc[lane]);
    return result;
}
#endif

// The same, into a sum that stays in its register. Where a tile fills the registers the compiler may not choose the
// form of the instruction that overwrites a factor: it ends in copies and spills.
#if (FIVEDP_VECTOR_BYTES == 64 && defined(__AVX512F__)) || (FIVEDP_VECTOR_BYTES == 32 && defined(__FMA__))
FIVEDP_INLINE void fuse_into(Vec<float>& sum, Vec<float> a, Vec<float> b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
FIVEDP_INLINE void fuse_into(Vec<double>& sum, Vec<double> a, Vec<double> b) {
    __asm__("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
#else
template <class V>
FIVEDP_INLINE void fuse_into(V& sum, V a, V b) {
    sum = fused(a, b, sum);
}
#endif

// One element from memory that may be unaligned, widened to T; bfloat16 is the upper half of a float.
template <class T, class Source>
FIVEDP_INLINE T element(const char* from) {
    Source value;
    __builtin_memcpy(&value, from, sizeof value);
    if constexpr (sizeof(Source) == 2 && sizeof(T) == 4) {
        const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
        T result;
        __builtin_memcpy(&result, &bits, sizeof result);
        return result;
    } else {
        return static_cast<T>(value);
    }
}

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
FIVEDP_INLINE std::uint16_t round_to_bf16(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

// A vector of them: half as many bytes as their floats.
typedef std::uint16_t Halves __attribute__((vector_size(FIVEDP_VECTOR_BYTES / 2)));

FIVEDP_INLINE Vec<float> widened(const Halves& values) {
    return (Vec<float>)(__builtin_convertvector(values, Vec<std::uint32_t>) << 16);
}

// round_to_bf16 of each.
FIVEDP_INLINE Halves rounded_to_bf16(const Vec<float>& values) {
#ifdef __AVX512BF16__
    // The instruction rounds in the same way, but takes what is below the normal numbers for zero.
    constexpr int denormal = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)values, denormal) == 0, 1))
        return (Halves)_mm512_cvtneps_pbh((__m512)values);
#endif
    const Vec<std::uint32_t> bits = (Vec<std::uint32_t>)values, high = bits >> 16;
    const Vec<std::uint32_t> rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? (high | 0x40u) : rounded, Halves);
}
