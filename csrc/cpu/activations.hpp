// The activations of an expert and their derivatives, on vectors. No lane influences another, and every operation is
// exactly rounded or a fused multiply-add, so the bits are the same on every instruction set.
//
// Errors in units of the last place: exponential and sigmoid under 3, silu and gelu under 4, derivatives under 3 of 1;
// gelu_tanh takes along the rounding of its argument, whose error is a few units times the argument. A factor below the
// smallest normal number counts as 0.

// exp(high + low) for high <= 0 and |low| tiny beside it. The argument is turned into units of log 2 with a remainder,
// so that the error does not grow with it.
template <class T>
FIVEDP_INLINE Vec<T> exp_of(Vec<T> high, Vec<T> low) {
    constexpr T log2_e = T(1.4426950408889634074);
    // log2(e) less its value rounded to T
    const Vec<T> rest = broadcast<T>(sizeof(T) == 4 ? T(1.9259629911266174681e-8) : T(2.0355273740931032981e-17));
    const Vec<T> scaled = high * broadcast<T>(log2_e);
    Vec<T> remainder = fused(high, broadcast<T>(log2_e), -scaled);
    remainder = fused(high, rest, remainder);
    remainder = fused(low, broadcast<T>(log2_e), remainder);
    const Vec<T> power = exp2<T>(scaled);
    return fused(power, remainder * broadcast<T>(T(0.69314718055994530942)), power);
}

template <class T>
FIVEDP_INLINE Vec<T> magnitude(Vec<T> x) {
    return x < Vec<T>{} ? -x : x;
}

// 1 / (1 + exp(-x)) and 1 / (1 + exp(x)): both without cancellation.
template <class T>
struct Sigmoid {
    Vec<T> value, rest;
};
template <class T>
FIVEDP_INLINE Sigmoid<T> sigmoid(Vec<T> x) {
    // Beyond 800 the smaller one is 0 in either type; infinity would be multiplied by 0. NaN stays NaN.
    const Vec<T> one = broadcast<T>(T(1)), limit = broadcast<T>(T(800)), size = magnitude<T>(x);
    const Vec<T> small = exp_of<T>(-(size > limit ? limit : size), Vec<T>{});
    const Vec<T> larger_part = one / (one + small), smaller_part = small / (one + small);
    const auto negative = x < Vec<T>{};
    return {negative ? smaller_part : larger_part, negative ? larger_part : smaller_part};
}

// (1 + 2 z) exp(z^2) erfc(z) for z >= 0 as a polynomial in (z - c) / (z + c), which maps [0, infinity) to [-1, 1): the
// Chebyshev series, cut off where the rest is below 5e-9 in float and 5e-18 in double. c keeps it short.
template <class T>
static constexpr int erfc_terms = sizeof(T) == 4 ? 12 : 25;
template <class T>
static constexpr T erfc_center = sizeof(T) == 4 ? T(3) : T(3.75);
static constexpr float erfc_in_float[] = {1.2530080563677553f,     -0.1356210694002736f,   -0.047562156927520074f,
                                          0.12964411434408139f,    -0.11927527528224089f,  0.068316567771140853f,
                                          -0.02376357643949504f,   0.0024991168696069476f, 0.001875079123772353f,
                                          -7.2645367903404842e-4f, -9.254516686923966e-5f, 7.7310242240768951e-5f};
static constexpr double erfc_in_double[] = {
    1.2375126308378275796,     -0.14024059858554696245,    0.003585415485464429369,     0.082276738490145207683,
    -0.10880393014174885723,   0.09230432116037747776,     -0.058693398589636774061,    0.028362277418956404286,
    -0.0097465795580292755337, 0.0017556258528952953569,   0.00029371366559134481992,   -0.00029015408054084171105,
    0.00005164909889268240345, 0.000022384239155082229819, -0.000011444146237700523376, -9.7355989673677493224e-7,
    1.7516376488490621479e-6,  -5.721823060322408962e-8,   -2.5866850716155885967e-7,   2.3263508708859125273e-8,
    3.867533424222236043e-8,   -3.744210080962019281e-9,   -5.1739902140113110549e-9,   3.111433380979926339e-10,
    4.2514714447963922374e-10};

// The normal distribution, P(X <= x) = erfc(-x / sqrt 2) / 2, and its density.
template <class T>
struct Normal {
    Vec<T> distribution, density;
};
template <class T>
FIVEDP_INLINE Normal<T> normal(Vec<T> x) {
    const Vec<T> one = broadcast<T>(T(1)), half = broadcast<T>(T(0.5)), center = broadcast<T>(erfc_center<T>);
    // Beyond 40 the tail is 0 in either type, and squares must not overflow. NaN stays NaN.
    const Vec<T> limit = broadcast<T>(T(40)), size = magnitude<T>(x), y = size > limit ? limit : size;
    const Vec<T> square = y * y;
    const Vec<T> gauss = exp_of<T>(-half * square, -half * fused(y, y, -square));
    const Vec<T> z = y * broadcast<T>(T(0.70710678118654752440)), t = (z - center) / (z + center);
    const auto coefficient = [](int i) { return sizeof(T) == 4 ? T(erfc_in_float[i]) : T(erfc_in_double[i]); };
    Vec<T> sum = broadcast<T>(coefficient(erfc_terms<T> - 1));
#pragma GCC unroll 25
    for (int i = erfc_terms<T> - 2; i >= 0; --i) sum = fused(sum, t, broadcast<T>(coefficient(i)));
    const Vec<T> tail = half * gauss * sum / (one + (z + z));
    return {x < Vec<T>{} ? tail : one - tail, gauss * broadcast<T>(T(0.39894228040143267794))};
}

// An activation and, where it is asked for, its derivative.
template <class T>
struct Activated {
    Vec<T> value, slope;
};

template <Activation activation, class T>
FIVEDP_INLINE Activated<T> activated(Vec<T> x) {
    const Vec<T> one = broadcast<T>(T(1));
    if constexpr (activation == Activation::silu) {
        const Sigmoid<T> s = sigmoid<T>(x);
        return {x * s.value, s.value * fused(x, s.rest, one)};
    } else if constexpr (activation == Activation::gelu) {
        const Normal<T> p = normal<T>(x);
        return {x * p.distribution, fused(x, p.density, p.distribution)};
    } else if constexpr (activation == Activation::gelu_tanh) {
        // (1 + tanh u) / 2 = sigmoid(2 u) with 2 u = 2 sqrt(2 / pi) (x + 0.044715 x^3). Beyond 100 all is saturated,
        // and powers must not overflow.
        const Vec<T> scale = broadcast<T>(T(1.5957691216057307118)), cubic = broadcast<T>(T(0.044715));
        const Vec<T> limit = broadcast<T>(T(100)), y = x > limit ? limit : x < -limit ? -limit : x, square = y * y;
        const Sigmoid<T> s = sigmoid<T>(scale * y * fused(cubic, square, one));
        const Vec<T> inner = scale * fused(broadcast<T>(T(3 * 0.044715)), square, one);
        return {x * s.value, s.value * fused(y * s.rest, inner, one)};
    } else {
        const Vec<T> zero = {};
        return {x <= zero ? zero : x, x <= zero ? zero : one};
    }
}
