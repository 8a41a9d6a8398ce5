// Elementary functions of vectors.

template <class T>
using IndexOf = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

template <class T>
FIVEDP_INLINE Vec<T> larger(Vec<T> x, Vec<T> y) {
    return x > y ? x : y;
}

// The coefficients of 2^f = exp(f log 2): log(2)^n / n!.
template <class T>
static constexpr int exp2_terms = sizeof(T) == 4 ? 8 : 14;
template <class T>
static constexpr T exp2_coefficient[14] = {T(1.0),
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

// 2^x for x up to the largest exponent; below the smallest normal number the result is 0. x = n + f with |f| <= 1/2,
// the Taylor series of 2^f (its remainder is under 5e-9 in float, 5e-18 in double, so rounding dominates: 1 ulp and a
// half), and n added to the exponent's bits. NaN stays NaN.
template <class T>
FIVEDP_INLINE Vec<T> exp2(Vec<T> x) {
    using Bits = std::make_unsigned_t<IndexOf<T>>;
    constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
    constexpr T lowest = sizeof(T) == 4 ? T(-126) : T(-1022);
    const Vec<T> magic = broadcast<T>(sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0));  // 1.5 * 2^mantissa
    const Vec<T> shifted = x + magic;
    const Vec<T> f = x - (shifted - magic);
    Vec<T> sum = broadcast<T>(exp2_coefficient<T>[exp2_terms<T> - 1]);
#pragma GCC unroll 14
    for (int n = exp2_terms<T> - 2; n >= 0; --n) sum = fused(sum, f, broadcast<T>(exp2_coefficient<T>[n]));
    const Vec<T> scaled = (Vec<T>)((Vec<Bits>)sum + ((Vec<Bits>)shifted << mantissa));
    // 0 * x is added for NaN, whose bits the sum above may have made a number.
    return x < broadcast<T>(lowest) ? Vec<T>{} : fused(x, Vec<T>{}, scaled);
}

// tanh(y), y limited to where it is 1 anyway: with e = exp(2 y), 1 - 2 / (e + 1), and where that would cancel,
// (e - 1) / (e + 1) with the series of e - 1.
template <class T>
FIVEDP_INLINE Vec<T> tanh_of(Vec<T> y) {
    const Vec<T> limit = broadcast<T>(T(20)), one = broadcast<T>(T(1)), two = broadcast<T>(T(2));
    y = y > limit ? limit : y < -limit ? -limit : y;
    const Vec<T> x = y * broadcast<T>(T(2.8853900817779268147));  // 2 y in units of log 2
    Vec<T> sum = broadcast<T>(exp2_coefficient<T>[exp2_terms<T> - 1]);
#pragma GCC unroll 14
    for (int n = exp2_terms<T> - 2; n >= 1; --n) sum = fused(sum, x, broadcast<T>(exp2_coefficient<T>[n]));
    const Vec<T> less_one = sum * x;
    const Vec<T> half = broadcast<T>(T(0.5));
    return x < half && x > -half ? less_one / (less_one + two) : one - two / (exp2<T>(x) + one);
}
