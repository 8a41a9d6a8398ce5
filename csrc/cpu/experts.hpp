// What lies between and around an expert's products, row by row, in one pass over memory: the activation and its
// gradient, the combine of a token's experts, weighted rows and dot products.
//
// Everything is computed in the type of sums (float for bfloat16) and rounded where it is stored.

// One vector of sums from `n` stored elements, n <= lanes; what is missing is zero, and nothing beyond is read.
template <class T, class Stored>
FIVEDP_INLINE Vec<T> load_elements(const char* from, std::int64_t n) {
    if constexpr (sizeof(Stored) == 2) {
        Halves values = {};
        __builtin_memcpy(&values, from, n == lanes<T> ? sizeof values : n * sizeof(Stored));
        return widened(values);
    } else {
        Vec<T> values = {};
        __builtin_memcpy(&values, from, n == lanes<T> ? sizeof values : n * sizeof(Stored));
        return values;
    }
}

template <class T, class Stored>
FIVEDP_INLINE void store_elements(char* to, const Vec<T>& sums, std::int64_t n) {
    if constexpr (sizeof(Stored) == 2) {
        const Halves halves = rounded_to_bf16(sums);
        __builtin_memcpy(to, &halves, n == lanes<T> ? sizeof halves : n * sizeof(Stored));
    } else {
        __builtin_memcpy(to, &sums, n == lanes<T> ? sizeof sums : n * sizeof(Stored));
    }
}

// A sum as it reads after it was stored.
template <class T, class Stored>
FIVEDP_INLINE Vec<T> as_stored(const Vec<T>& sums) {
    if constexpr (sizeof(Stored) == 2)
        return widened(rounded_to_bf16(sums));
    else
        return sums;
}

FIVEDP_INLINE char* row_of(const RowsView& view, std::int64_t row) {
    return view.table != nullptr ? const_cast<char*>(view.table[row]) : view.data + row * view.stride;
}

// A dot product: element j goes to partial sum j % dot_sums, in rising j, by fused multiply-add; the partial sums are
// then added half to half. The same on every instruction set.
template <class T>
static constexpr int dot_sums = 128 / sizeof(T);
template <class T>
struct Dot {
    static constexpr int vectors = dot_sums<T> / lanes<T>;
    Vec<T> sum[vectors];
};

template <class T>
FIVEDP_INLINE T total(const Dot<T>& dot) {
    T sums[dot_sums<T>];
    __builtin_memcpy(sums, dot.sum, sizeof sums);
    for (int half = dot_sums<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    return sums[0];
}

// Without it the compiler may call a large body instead of unrolling it.
#define FIVEDP_INLINE_LAMBDA __attribute__((always_inline))

// Calls step(vector, column, n) for the columns of a row, `vectors` in turn, and n < lanes at its end only.
template <class T, int vectors, class Step>
FIVEDP_INLINE void each_vector(std::int64_t columns, const Step& step) {
    std::int64_t column = 0;
    for (; column + vectors * lanes<T> <= columns; column += vectors * lanes<T>)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) step(v, column + v * lanes<T>, lanes<T>);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
        const std::int64_t left = columns - column - v * lanes<T>;
        if (left > 0) step(v, column + v * lanes<T>, left < lanes<T> ? left : lanes<T>);
    }
}

template <class T, class Stored, Activation activation, bool gated>
FIVEDP_NOINLINE void activate_rows(const ActivationProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    constexpr std::int64_t size = sizeof(Stored);
    for (std::int64_t row = row_begin; row < row_end; ++row) {
        const char* const gate = gated ? row_of(problem.gate, row) : nullptr;
        const char* const up = row_of(problem.up, row);
        char* const hidden = row_of(problem.hidden, row);
        each_vector<T, 1>(problem.columns, [&](int, std::int64_t column, std::int64_t n) FIVEDP_INLINE_LAMBDA {
            const Vec<T> u = load_elements<T, Stored>(up + column * size, n);
            Vec<T> value;
            if constexpr (gated)
                value = activated<activation, T>(load_elements<T, Stored>(gate + column * size, n)).value * u;
            else
                value = activated<activation, T>(u).value;
            store_elements<T, Stored>(hidden + column * size, value, n);
        });
    }
}

template <class T, class Stored, class Incoming, Activation activation, bool gated>
FIVEDP_NOINLINE void activation_gradient_rows(const ActivationGradientProblem& problem, std::int64_t row_begin,
                                              std::int64_t row_end) {
    constexpr std::int64_t size = sizeof(Stored);
    for (std::int64_t row = row_begin; row < row_end; ++row) {
        const char* const d_hidden = row_of(problem.d_hidden, row);
        const char* const gate = gated ? row_of(problem.gate, row) : nullptr;
        const char* const up = row_of(problem.up, row);
        char* const d_gate = gated ? row_of(problem.d_gate, row) : nullptr;
        char* const d_up = row_of(problem.d_up, row);
        char* const hidden_weighted =
            problem.hidden_weighted.data != nullptr ? row_of(problem.hidden_weighted, row) : nullptr;
        const T one_weight =
            problem.weights != nullptr ? element<T, T>(problem.weights + row * (std::int64_t)sizeof(T)) : T(1);
        const Vec<T> weight = broadcast<T>(one_weight);
        Dot<T> dot = {};
        each_vector<T, Dot<T>::vectors>(
            problem.columns, [&](int v, std::int64_t column, std::int64_t n) FIVEDP_INLINE_LAMBDA {
                const Vec<T> d = load_elements<T, Incoming>(d_hidden + column * (std::int64_t)sizeof(Incoming), n);
                const Vec<T> u = load_elements<T, Stored>(up + column * size, n);
                const Vec<T> weighted = weight * d;
                Vec<T> hidden;
                if constexpr (gated) {
                    const Activated<T> g = activated<activation, T>(load_elements<T, Stored>(gate + column * size, n));
                    hidden = g.value * u;
                    store_elements<T, Stored>(d_gate + column * size, weighted * u * g.slope, n);
                    store_elements<T, Stored>(d_up + column * size, weighted * g.value, n);
                } else {
                    const Activated<T> g = activated<activation, T>(u);
                    hidden = g.value;
                    store_elements<T, Stored>(d_up + column * size, weighted * g.slope, n);
                }
                hidden = as_stored<T, Stored>(hidden);  // what the second product read
                dot.sum[v] = fused(d, hidden, dot.sum[v]);
                if (hidden_weighted != nullptr)
                    store_elements<T, Stored>(hidden_weighted + column * size, weight * hidden, n);
            });
        if (problem.d_weights != nullptr) {
            const T sum = total<T>(dot);
            __builtin_memcpy(problem.d_weights + row * (std::int64_t)sizeof(T), &sum, sizeof sum);
        }
    }
}

// How deep the lowest common ancestor of two experts, a < b, lies in the tree that halves [0, n), the first half
// getting the odd one.
FIVEDP_INLINE int common_depth(std::int64_t n, std::int64_t a, std::int64_t b) {
    std::int64_t begin = 0;
    for (int depth = 0;; ++depth) {
        const std::int64_t half = begin + (n + 1) / 2;
        if (a < half && b >= half) return depth;
        if (a < half) {
            n = (n + 1) / 2;
        } else {
            n -= (n + 1) / 2;
            begin = half;
        }
    }
}

// How many sums end behind each row of one output: a sum that lies deeper than the ancestor it shares with the next row
// is complete.
FIVEDP_INLINE void plan_joins(const CombineProblem& problem, std::int64_t begin, std::int64_t end) {
    std::int8_t depths[64];  // of the ancestors that join what is open; the tree has at most 32 levels
    int open = 0;
    for (std::int64_t p = begin; p < end; ++p) {
        const int next = p + 1 < end ? common_depth(problem.n_experts, problem.experts[p], problem.experts[p + 1]) : -1;
        int joins = 0;
        for (; open > 0 && depths[open - 1] > next; --open) ++joins;
        if (p + 1 < end) depths[open++] = (std::int8_t)next;
        problem.joins[p] = (std::uint8_t)joins;
    }
}

// A run of columns of all open sums stays in the L1 cache while the rows pass by.
template <class T, class Stored>
FIVEDP_NOINLINE void combine_outputs(const CombineProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    constexpr std::int64_t run = 2048 / sizeof(T), size = sizeof(Stored);
    alignas(64) T stack[40][run];
    for (std::int64_t row = row_begin; row < row_end; ++row) {
        const std::int64_t begin = problem.starts[row], end = problem.starts[row + 1];
        plan_joins(problem, begin, end);
        char* const out = row_of(problem.out, row);
        const std::int64_t out_size = problem.out.type == ElementType::bf16 ? 2 : sizeof(T);
        for (std::int64_t column = 0; column < problem.columns; column += run) {
            const std::int64_t n = problem.columns - column < run ? problem.columns - column : run;
            int open = 0;
            if (begin == end)
                for (std::int64_t j = 0; j < n; ++j) stack[0][j] = T(0);
            for (std::int64_t p = begin; p < end; ++p) {
                const char* const from = row_of(problem.rows, p) + column * size;
                const bool weighted = problem.weights != nullptr;
                const Vec<T> weight =
                    broadcast<T>(weighted ? element<T, T>(problem.weights + p * (std::int64_t)sizeof(T)) : T(1));
                int joins = problem.joins[p];
                // A leaf that ends a sum is added as it is read.
                T* const to = stack[joins > 0 ? open - 1 : open];
                if (joins > 0)
                    each_vector<T, 1>(n, [&](int, std::int64_t j, std::int64_t left) FIVEDP_INLINE_LAMBDA {
                        const Vec<T> value = load_elements<T, Stored>(from + j * size, left);
                        store(to + j, load<Vec<T>>(to + j) + (weighted ? weight * value : value));
                    });
                else
                    each_vector<T, 1>(n, [&](int, std::int64_t j, std::int64_t left) FIVEDP_INLINE_LAMBDA {
                        const Vec<T> value = load_elements<T, Stored>(from + j * size, left);
                        store(to + j, weighted ? weight * value : value);
                    });
                if (joins > 0)
                    --joins;
                else
                    ++open;
                for (; joins > 0; --joins, --open) {
                    T* const left = stack[open - 2];
                    const T* const right = stack[open - 1];
                    each_vector<T, 1>(n, [&](int, std::int64_t j, std::int64_t) FIVEDP_INLINE_LAMBDA {
                        store(left + j, load<Vec<T>>(left + j) + load<Vec<T>>(right + j));
                    });
                }
            }
            finish_row_as<T>(problem.out.type, stack[0], out + column * out_size, out_size, n, 1.0, 0.0);
        }
    }
}

template <class T, class Stored, class Result>
FIVEDP_NOINLINE void weigh_rows(const WeightedRowsProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    for (std::int64_t row = row_begin; row < row_end; ++row) {
        const char* const from = row_of(problem.rows, row);
        char* const to = row_of(problem.out, row);
        const Vec<T> weight = broadcast<T>(element<T, T>(problem.weights + row * (std::int64_t)sizeof(T)));
        each_vector<T, 2>(problem.columns, [&](int, std::int64_t column, std::int64_t n) FIVEDP_INLINE_LAMBDA {
            store_elements<T, Result>(
                to + column * (std::int64_t)sizeof(Result),
                weight * load_elements<T, Stored>(from + column * (std::int64_t)sizeof(Stored), n), n);
        });
    }
}

template <class T, class A, class B>
FIVEDP_NOINLINE void dot_rows(const RowDotsProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    for (std::int64_t row = row_begin; row < row_end; ++row) {
        const char* const a = row_of(problem.a, row);
        const char* const b = row_of(problem.b, row);
        Dot<T> dot = {};
        each_vector<T, Dot<T>::vectors>(
            problem.columns, [&](int v, std::int64_t column, std::int64_t n) FIVEDP_INLINE_LAMBDA {
                dot.sum[v] = fused(load_elements<T, A>(a + column * (std::int64_t)sizeof(A), n),
                                   load_elements<T, B>(b + column * (std::int64_t)sizeof(B), n), dot.sum[v]);
            });
        const T sum = total<T>(dot);
        __builtin_memcpy(problem.out + row * (std::int64_t)sizeof(T), &sum, sizeof sum);
    }
}

// From values known at run time to the functions above.
template <class T>
struct TypeTag {
    using type = T;
};

// Calls with(sums, stored).
template <class With>
FIVEDP_INLINE void with_types(ElementType stored, const With& with) {
    if (stored == ElementType::f64)
        with(TypeTag<double>(), TypeTag<double>());
    else if (stored == ElementType::f32)
        with(TypeTag<float>(), TypeTag<float>());
    else
        with(TypeTag<float>(), TypeTag<std::uint16_t>());
}

// Calls with(other) for a second array beside one whose sums are T.
template <class T, class With>
FIVEDP_INLINE void with_other(ElementType other, const With& with) {
    if constexpr (sizeof(T) == 8) {
        with(TypeTag<double>());
    } else {
        if (other == ElementType::bf16)
            with(TypeTag<std::uint16_t>());
        else
            with(TypeTag<float>());
    }
}

// Calls with(activation, gated): only silu is gated.
template <class With>
FIVEDP_INLINE void with_activation(Activation activation, bool gated, const With& with) {
    if (gated) return with(std::integral_constant<Activation, Activation::silu>(), std::true_type());
    if (activation == Activation::silu)
        with(std::integral_constant<Activation, Activation::silu>(), std::false_type());
    else if (activation == Activation::gelu)
        with(std::integral_constant<Activation, Activation::gelu>(), std::false_type());
    else if (activation == Activation::gelu_tanh)
        with(std::integral_constant<Activation, Activation::gelu_tanh>(), std::false_type());
    else
        with(std::integral_constant<Activation, Activation::relu>(), std::false_type());
}

static void activate(const ActivationProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    with_types(problem.type, [&](auto sums, auto stored) {
        with_activation(problem.activation, problem.gate.data != nullptr, [&](auto activation, auto gated) {
            activate_rows<typename decltype(sums)::type, typename decltype(stored)::type, decltype(activation)::value,
                          decltype(gated)::value>(problem, row_begin, row_end);
        });
    });
}

static void activation_gradient(const ActivationGradientProblem& problem, std::int64_t row_begin,
                                std::int64_t row_end) {
    with_types(problem.type, [&](auto sums, auto stored) {
        using T = typename decltype(sums)::type;
        using Stored = typename decltype(stored)::type;
        with_activation(problem.activation, problem.gate.data != nullptr, [&](auto activation, auto gated) {
            constexpr Activation chosen = decltype(activation)::value;
            constexpr bool with_gate = decltype(gated)::value;
            if constexpr (sizeof(Stored) == 2) {
                if (problem.d_hidden.type == ElementType::f32)
                    return activation_gradient_rows<T, Stored, float, chosen, with_gate>(problem, row_begin, row_end);
            }
            activation_gradient_rows<T, Stored, Stored, chosen, with_gate>(problem, row_begin, row_end);
        });
    });
}

static void combine(const CombineProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    with_types(problem.rows.type, [&](auto sums, auto stored) {
        combine_outputs<typename decltype(sums)::type, typename decltype(stored)::type>(problem, row_begin, row_end);
    });
}

static void weighted_rows(const WeightedRowsProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    with_types(problem.rows.type, [&](auto sums, auto stored) {
        using T = typename decltype(sums)::type;
        with_other<T>(problem.out.type, [&](auto result) {
            weigh_rows<T, typename decltype(stored)::type, typename decltype(result)::type>(problem, row_begin,
                                                                                            row_end);
        });
    });
}

static void row_dots(const RowDotsProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    with_types(problem.a.type, [&](auto sums, auto a) {
        using T = typename decltype(sums)::type;
        with_other<T>(problem.b.type, [&](auto b) {
            dot_rows<T, typename decltype(a)::type, typename decltype(b)::type>(problem, row_begin, row_end);
        });
    });
}
