// The places of the k highest of a row, found without a branch to guess, and the sum of its two highest.

// Room for those that may be among the best of a row.
template <class T>
struct Candidates {
    T* keys;
    IndexOf<T>*names, *ranks;
    std::int32_t* sorted;
};

// A key that at least k of a row of n have reached: the k-th highest of the maxima of at least 2 k columns.
template <class T>
FIVEDP_INLINE T reached_by(const T* row, std::int64_t n, std::int64_t k, T* maxima) {
    using Index = IndexOf<T>;
    const std::int64_t columns = whole_blocks(2 * k, routing_lanes<T>);
    if (2 * columns > n) return no_number<T>;
    each_vector<T>(columns, [&](std::int64_t j) {
        Vec<T> highest = load<Vec<T>>(row + j);
        for (std::int64_t i = j + columns; i < n; i += columns) highest = larger<T>(load<Vec<T>>(row + i), highest);
        store(maxima + j, highest);
    });
    Vec<T> found = broadcast<T>(no_number<T>);
    each_vector<T>(columns, [&](std::int64_t j) {
        const Vec<T> here = load<Vec<T>>(maxima + j);
        Vec<Index> as_high{};  // minus the number of columns that are
        for (std::int64_t i = 0; i < columns; ++i) as_high += (Vec<Index>)(broadcast<T>(maxima[i]) >= here);
        found = larger<T>(as_high <= -(Index)k - Vec<Index>{} ? here : found, found);
    });
    return highest_lane<T>(found);
}

// Appends the elements of a row that have reached `least`, in their order, and returns how many these are.
template <class T>
FIVEDP_INLINE std::int64_t collect(const T* row, std::int64_t n, T least, const Candidates<T>& to) {
    const Vec<T> limit = broadcast<T>(least);
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < n; i += lanes<T>) {
        const Vec<T> keys = load<Vec<T>>(row + i);
        std::uint32_t found = lanes_at_least<T>(keys, limit);
#if FIVEDP_VECTOR_BYTES == 64 && defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) {
            const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512i names = _mm512_add_epi32(lane, _mm512_set1_epi32((int)i));
            _mm512_storeu_ps(to.keys + count, _mm512_maskz_compress_ps((__mmask16)found, (__m512)keys));
            _mm512_storeu_si512(to.names + count, _mm512_maskz_compress_epi32((__mmask16)found, names));
        } else {
            const __m512i names = _mm512_add_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(i));
            _mm512_storeu_pd(to.keys + count, _mm512_maskz_compress_pd((__mmask8)found, (__m512d)keys));
            _mm512_storeu_si512(to.names + count, _mm512_maskz_compress_epi64((__mmask8)found, names));
        }
        count += __builtin_popcount(found);
#else
        for (; found != 0; found &= found - 1) {
            const std::int64_t place = i + __builtin_ctz(found);
            to.keys[count] = row[place];
            to.names[count++] = (IndexOf<T>)place;
        }
#endif
    }
    return count;
}

// The places of the k highest of a row, the highest first, equal ones by place. The row has k elements or more and is
// filled up with minus infinity to n, whole blocks. There is no branch to guess: all that have reached a key which k
// have reached are candidates, and how many of them come before one is its place in the result.
template <class T>
FIVEDP_INLINE void best_of(const T* row, std::int64_t n, std::int64_t k, const Candidates<T>& scratch,
                           std::int32_t* best) {
    using Index = IndexOf<T>;
    const std::int64_t count = collect(row, n, reached_by(row, n, k, scratch.keys), scratch);
    const std::int64_t padded = whole_blocks(count, lanes<T>);
    Index step[lanes<T>];
    for (int lane = 0; lane < lanes<T>; ++lane) step[lane] = lane;
    for (std::int64_t i = 0; i < padded; i += lanes<T>) {
        const Vec<T> here = load<Vec<T>>(scratch.keys + i);
        const Vec<Index> place = load<Vec<Index>>(step) + (Index)i;
        Vec<Index> before{};  // minus the number of candidates that come before
        for (std::int64_t j = 0; j < count; ++j) {
            const Vec<T> other = broadcast<T>(scratch.keys[j]);
            before += (Vec<Index>)(other > here) |
                      ((Vec<Index>)(other == here) & (Vec<Index>)((Index)j - Vec<Index>{} < place));
        }
        store(scratch.ranks + i, -before);
    }
    for (std::int64_t i = 0; i < count; ++i) scratch.sorted[scratch.ranks[i]] = (std::int32_t)scratch.names[i];
    for (std::int64_t slot = 0; slot < k; ++slot) best[slot] = scratch.sorted[slot];
}

// The sum of the two highest of row[begin] .. row[end - 1], or the one there is.
template <class T>
FIVEDP_INLINE T best_two(const T* row, std::int64_t begin, std::int64_t end) {
    if (end - begin == 1) return row[begin];
    T first[lanes<T>], second[lanes<T>], tail[lanes<T>];
    Vec<T> high = broadcast<T>(no_number<T>), low = high;
    const auto meet = [&](Vec<T> x) {
        low = larger<T>(low, smaller<T>(high, x));
        high = larger<T>(high, x);
    };
    const std::int64_t whole = begin + (end - begin) / lanes<T> * lanes<T>;
    for (std::int64_t i = begin; i < whole; i += lanes<T>) meet(load<Vec<T>>(row + i));
    if (whole < end) {
        for (int lane = 0; lane < lanes<T>; ++lane) tail[lane] = whole + lane < end ? row[whole + lane] : no_number<T>;
        meet(load<Vec<T>>(tail));
    }
    store(first, high);
    store(second, low);
#pragma GCC unroll 4
    for (int half = lanes<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) {
            const T lower = first[i] < first[i + half] ? first[i] : first[i + half];
            first[i] = first[i] > first[i + half] ? first[i] : first[i + half];
            second[i] = second[i] > second[i + half] ? second[i] : second[i + half];
            second[i] = second[i] > lower ? second[i] : lower;
        }
    return first[0] + second[0];
}
