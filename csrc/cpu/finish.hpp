// The last step of every sum: result = alpha * sum + beta * c, rounded once to C's type.
// The product and the tree sum share it, so that both give the same bits. C is not read where beta is 0.

template <class T, class Stored>
FIVEDP_INLINE void finish_element(T sum, char* c, bool scale, T alpha, bool add, T beta) {
    T value = scale ? alpha * sum : sum;
    if (add) value = value + beta * element<T, Stored>(c);
    if constexpr (sizeof(Stored) == 2) {
        const std::uint16_t rounded = round_to_bf16(value);
        __builtin_memcpy(c, &rounded, sizeof rounded);
    } else {
        __builtin_memcpy(c, &value, sizeof value);
    }
}

// n sums, rounded, side by side: whole vectors of them first. Returns how many.
FIVEDP_INLINE std::int64_t round_vectors(const float* sums, char* c, std::int64_t n) {
    constexpr std::int64_t width = lanes<float>;
    std::int64_t j = 0;
    for (; j + width <= n; j += width) store(c + 2 * j, rounded_to_bf16(load<Vec<float>>(sums + j)));
    return j;
}

// One row of n sums into C. The common cases are separate loops so that each is vectorised.
template <class T, class Stored>
FIVEDP_INLINE void finish_row(const T* __restrict__ sums, char* __restrict__ c, std::int64_t stride, std::int64_t n,
                              T alpha, T beta) {
    const bool scale = alpha != T(1), add = beta != T(0);
    if (stride == sizeof(Stored)) {
        if (!scale && !add) {
            std::int64_t j = 0;
            if constexpr (sizeof(Stored) == 2) j = round_vectors(sums, c, n);
            for (; j < n; ++j) finish_element<T, Stored>(sums[j], c + j * sizeof(Stored), false, alpha, false, beta);
        } else if (!add) {
            for (std::int64_t j = 0; j < n; ++j)
                finish_element<T, Stored>(sums[j], c + j * sizeof(Stored), true, alpha, false, beta);
        } else if (!scale) {
            for (std::int64_t j = 0; j < n; ++j)
                finish_element<T, Stored>(sums[j], c + j * sizeof(Stored), false, alpha, true, beta);
        } else {
            for (std::int64_t j = 0; j < n; ++j)
                finish_element<T, Stored>(sums[j], c + j * sizeof(Stored), true, alpha, true, beta);
        }
    } else {
        for (std::int64_t j = 0; j < n; ++j)
            finish_element<T, Stored>(sums[j], c + j * stride, scale, alpha, add, beta);
    }
}

template <class T>
FIVEDP_INLINE void finish_row_as(ElementType type, const T* sums, char* c, std::int64_t stride, std::int64_t n,
                                 double alpha, double beta) {
    if constexpr (sizeof(T) == 8) {
        finish_row<T, double>(sums, c, stride, n, alpha, beta);
    } else if (type == ElementType::bf16) {
        finish_row<T, std::uint16_t>(sums, c, stride, n, static_cast<T>(alpha), static_cast<T>(beta));
    } else {
        finish_row<T, float>(sums, c, stride, n, static_cast<T>(alpha), static_cast<T>(beta));
    }
}

// A tile of sums into C. The loops over rows as long as a tile's widest know their length.
template <class T>
FIVEDP_INLINE void finish_tile(const GemmProblem& problem, const T* sums, std::int64_t width, char* c,
                               std::int64_t n_rows, std::int64_t n_columns) {
    constexpr std::int64_t widest = FIVEDP_TILE_VECTORS * lanes<T>;
    const ArrayView& view = problem.c;
    for (std::int64_t r = 0; r < n_rows; ++r, c += view.row_stride, sums += width) {
        if (n_columns == widest)
            finish_row_as<T>(view.type, sums, c, view.col_stride, widest, problem.alpha, problem.beta);
        else
            finish_row_as<T>(view.type, sums, c, view.col_stride, n_columns, problem.alpha, problem.beta);
    }
}
