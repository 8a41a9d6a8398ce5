// Rows copied from one array to another.
//
// A box of a large array lies in memory as short rows far apart, which no hardware prefetcher follows: the rows that
// come next are fetched here. An ordinary store reads its line before it writes it; where the target is larger than the
// caches that read is wasted and pushes out what products work on, so whole lines are stored past them.
//
// Bytes: read once, written once; of ordinary stores, read once more.

// How many rows ahead: enough lines under way for rows of 1 KB, and still in the L1 cache when they are copied.
static constexpr std::int64_t copy_rows_ahead = 2;

FIVEDP_INLINE void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#elif defined(__AVX__)
    const __m256i low = _mm256_loadu_si256((const __m256i*)from), high = _mm256_loadu_si256((const __m256i*)from + 1);
    _mm256_stream_si256((__m256i*)to, low);
    _mm256_stream_si256((__m256i*)to + 1, high);
#elif defined(__SSE2__)
    for (int i = 0; i < 4; ++i) _mm_stream_si128((__m128i*)to + i, _mm_loadu_si128((const __m128i*)from + i));
#else
    __builtin_memcpy(to, from, 64);
#endif
}

template <bool stream>
FIVEDP_INLINE void copy_row(char* to, const char* from, std::int64_t bytes, const char* next) {
    std::int64_t at = 0;
    if (stream) {
        const std::int64_t head = -(std::intptr_t)to & 63;
        at = head < bytes ? head : bytes;
        __builtin_memcpy(to, from, at);
    }
    for (; at + 64 <= bytes; at += 64) {
        __builtin_prefetch(next + at);
        if (stream)
            stream_line(to + at, from + at);
        else
            __builtin_memcpy(to + at, from + at, 64);
    }
    __builtin_memcpy(to + at, from + at, bytes - at);
}

static void copy_rows(const CopyRows& copy) {
    for (std::int64_t row = 0; row < copy.rows; ++row) {
        char* const to = copy.to + row * copy.to_stride;
        const char* const from = copy.from + row * copy.from_stride;
        const std::int64_t left = copy.rows - 1 - row, ahead = left < copy_rows_ahead ? left : copy_rows_ahead;
        const char* const next = from + ahead * copy.from_stride;
        if (copy.stream)
            copy_row<true>(to, from, copy.bytes, next);
        else
            copy_row<false>(to, from, copy.bytes, next);
    }
#if defined(__SSE2__)
    // Stores past the caches keep no order: what follows, such as word to another rank, must find them done.
    if (copy.stream) _mm_sfence();
#endif
}
