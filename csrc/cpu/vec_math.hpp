// Elementary functions of vectors.

template <class T>
using IndexOf = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

// x > y ? x : y, lane by lane: y where either is NaN.
template <class T>
FIVEDP_INLINE Vec<T> larger(Vec<T> x, Vec<T> y) {
#if FIVEDP_VECTOR_BYTES == 64 && defined(__AVX512F__)
    // With a mask of ones: GCC 12 warns of the undefined vector inside the plain form.
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y);
    if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_max_pd(0xff, (__m512d)x, (__m512d)y);
#else
    return x > y ? x : y;
#endif
}

// 2^f for |f| <= 1/2: the polynomial 1 + c1 f + ... with the least relative error (Remez), which is 2e-9 in float and
// 4e-18 in double, so rounding dominates.
template <class T>
static constexpr int exp2_terms = sizeof(T) == 4 ? 7 : 12;
static constexpr float exp2_in_float[] = {1.0f,
                                          0.69314720285503164763f,
                                          0.24022647913636852127f,
                                          0.055503324711908571697f,
                                          0.0096184373569574205587f,
                                          0.0013398874393981390061f,
                                          0.00015353362068858489034f};
static constexpr double exp2_in_double[] = {1.0,
                                            0.69314718055994532581,
                                            0.2402265069591013126,
                                            0.055504108664820083227,
                                            0.0096181291075941200896,
                                            0.0013333558146774620517,
                                            0.0001540353045711209086,
                                            1.5252733493127489347e-5,
                                            1.3215435282308487999e-6,
                                            1.0178199571842137974e-7,
                                            7.0737832485031332991e-9,
                                            4.4347712982003767083e-10};

// 2^x for x up to the largest exponent; below the smallest normal number the result is 0, 2^n is exact for whole n, and
// NaN stays NaN. x = n + f with |f| <= 1/2, and n goes to the exponent. The error is under 2 ulp.
template <class T>
FIVEDP_INLINE Vec<T> exp2(Vec<T> x) {
    const Vec<T> lowest = broadcast<T>(sizeof(T) == 4 ? T(-126) : T(-1022));
    const Vec<T> magic = broadcast<T>(sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0));  // 1.5 * 2^mantissa
    const Vec<T> shifted = x + magic, n = shifted - magic, f = x - n;
    const auto coefficient = [](int i) { return sizeof(T) == 4 ? T(exp2_in_float[i]) : T(exp2_in_double[i]); };
    Vec<T> sum = broadcast<T>(coefficient(exp2_terms<T> - 1));
#pragma GCC unroll 14
    for (int i = exp2_terms<T> - 2; i >= 0; --i) sum = fused(sum, f, broadcast<T>(coefficient(i)));
#if FIVEDP_VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_NLT_UQ);
        return (Vec<T>)_mm512_maskz_scalef_ps(kept, (__m512)sum, (__m512)n);
    } else {
        const __mmask8 kept = _mm512_cmp_pd_mask((__m512d)x, (__m512d)lowest, _CMP_NLT_UQ);
        return (Vec<T>)_mm512_maskz_scalef_pd(kept, (__m512d)sum, (__m512d)n);
    }
#else
    using Bits = std::make_unsigned_t<IndexOf<T> >;
    constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
    const Vec<T> scaled = (Vec<T>)((Vec<Bits>)sum + ((Vec<Bits>)shifted << mantissa));
    // 0 * x is added for NaN, whose bits the sum above may have made a number.
    return x < lowest ? Vec<T>{} : fused(x, Vec<T>{}, scaled);
#endif
}

// The coefficients of 2^x - 1 = exp(x log 2) - 1 near 0: log(2)^n / n!.
template <class T>
static constexpr int expm1_terms = sizeof(T) == 4 ? 8 : 14;
template <class T>
static constexpr T expm1_coefficient[14] = {T(1.0),
                                            T(0.69314718055994530942),
                                            T(0.24022650695910071233),
                                            T(0.055504108664821579953),
                                            T(0.0096181291076284771619),
                                            T(0.0013333558146428443423),
                                            T(0.00015403530393381609954),
                                            T(1.5252733804059840280e-5),
                                            T(1.3215486790144309488e-6),
                                            T(1.0178086009239699728e-7),
                                            T(7.0549116208011233299e-9),
                                            T(4.4455382718708114976e-10),
                                            T(2.5678435993488205142e-11),
                                            T(1.3691488853904128881e-12)};

// tanh(y), y limited to where it is 1 anyway: with e = exp(2 y), 1 - 2 / (e + 1), and where that would cancel,
// (e - 1) / (e + 1) with the series of e - 1.
template <class T>
FIVEDP_INLINE Vec<T> tanh_of(Vec<T> y) {
    const Vec<T> limit = broadcast<T>(T(20)), one = broadcast<T>(T(1)), two = broadcast<T>(T(2));
    y = y > limit ? limit : y < -limit ? -limit : y;
    const Vec<T> x = y * broadcast<T>(T(2.8853900817779268147));  // 2 y in units of log 2
    Vec<T> sum = broadcast<T>(expm1_coefficient<T>[expm1_terms<T> - 1]);
#pragma GCC unroll 14
    for (int n = expm1_terms<T> - 2; n >= 1; --n) sum = fused(sum, x, broadcast<T>(expm1_coefficient<T>[n]));
    const Vec<T> less_one = sum * x;
    const Vec<T> half = broadcast<T>(T(0.5));
    return x < half && x > -half ? less_one / (less_one + two) : one - two / (exp2<T>(x) + one);
}
