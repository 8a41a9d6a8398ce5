// A GPU for tests, on the CPU: the functions of cuda/device.cuh with every thread of a block as a fiber.
//
// Blocks run one after another. Between two meetings (a barrier, a shuffle) the warps of a block run in an order that
// the seed chooses, so a missing barrier shows as wrong values. Shared memory is filled with NaN before every block;
// asynchronous copies happen when they are waited for, and what they will overwrite is NaN until then. A block in which
// some threads wait for others that have left or wait elsewhere ends with an error that says so.
//
// It knows nothing of time, of caches, or of orders within a matrix instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda/device_type.hpp"

#define FIVEDP_KERNEL(threads, blocks) static void
#define FIVEDP_DEVICE inline
#define FIVEDP_HOST_DEVICE inline
#define FIVEDP_SHARED static
#define FIVEDP_UNROLL
#define FIVEDP_NO_UNROLL

namespace fivedp {

namespace emulation {

struct Place {
    int thread = 0, threads = 0;
    std::int64_t block[3] = {}, blocks[3] = {};
};
extern Place here;
extern char* dynamic_memory;

// All 32 lanes give the address of their argument; when the last has come, `work` gets the 32 addresses.
void meet_warp(void* argument, const std::function<void(void**)>& work);
void meet_block();
// Runs when this thread waits for its copies.
void later(std::function<void()> copy);
void commit();
void wait(int pending);
// A random number, from the seed.
std::uint64_t draw();
// Lets other threads run: what a loop calls that waits for memory to change.
void pause();
// Returns once this is so.
void wait_until(std::function<bool()> condition);
// Runs some time before the block ends, when nobody knows.
void at_some_time(std::function<void()> work);
// What cuda/emulation/hopper.cpp keeps of a block, and of what this thread has seen of other blocks' writing.
void see_flag();
void begin_block(std::int64_t shared_bytes);
void end_block();

void run_grid(std::int64_t x, std::int64_t y, std::int64_t z, int threads, std::int64_t shared_bytes,
              const std::function<void()>& kernel);
// A launch in which this did not hold ends with an error; `what` is a sentence about an access.
void expect(bool holds, const char* what);
// The order in which warps run from now on.
void set_seed(std::uint64_t seed);

template <class T, class Choose>
T exchange(T value, const Choose& choose) {
    struct Slot {
        T value, result;
    } slot{value, value};
    meet_warp(&slot, [&choose](void** slots) {
        T values[32];
        for (int i = 0; i < 32; ++i) values[i] = static_cast<Slot*>(slots[i])->value;
        for (int i = 0; i < 32; ++i) static_cast<Slot*>(slots[i])->result = values[choose(i)];
    });
    return slot.result;
}

}  // namespace emulation

inline int thread() {
    return emulation::here.thread;
}
inline int lane() {
    return emulation::here.thread & 31;
}
inline int warp() {
    return emulation::here.thread >> 5;
}
inline int threads() {
    return emulation::here.threads;
}
inline std::int64_t block_x() {
    return emulation::here.block[0];
}
inline std::int64_t block_y() {
    return emulation::here.block[1];
}
inline std::int64_t block_z() {
    return emulation::here.block[2];
}
inline std::int64_t blocks_x() {
    return emulation::here.blocks[0];
}
inline char* dynamic_shared() {
    return emulation::dynamic_memory;
}

inline void sync_block() {
    emulation::meet_block();
}
inline void warp_sync() {
    emulation::meet_warp(nullptr, [](void**) {});
}
// The lane that each lane names may differ, so the choice is made with every lane's own argument.
template <class T>
T warp_from(T value, int source_lane) {
    struct Slot {
        T value;
        int source;
        T result;
    } slot{value, source_lane, value};
    emulation::meet_warp(&slot, [](void** slots) {
        for (int i = 0; i < 32; ++i) {
            Slot* const mine = static_cast<Slot*>(slots[i]);
            mine->result = static_cast<Slot*>(slots[mine->source & 31])->value;
        }
    });
    return slot.result;
}
template <class T>
T warp_xor(T value, int mask) {
    return emulation::exchange(value, [mask](int i) { return i ^ mask; });
}
template <class T>
T warp_up(T value, int distance) {
    return emulation::exchange(value, [distance](int i) { return i >= distance ? i - distance : i; });
}
inline std::uint32_t warp_ballot(bool value) {
    struct Slot {
        bool value;
        std::uint32_t result;
    } slot{value, 0};
    emulation::meet_warp(&slot, [](void** slots) {
        std::uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) bits |= static_cast<std::uint32_t>(static_cast<Slot*>(slots[i])->value) << i;
        for (int i = 0; i < 32; ++i) static_cast<Slot*>(slots[i])->result = bits;
    });
    return slot.result;
}
inline int count_bits(std::uint32_t value) {
    return __builtin_popcount(value);
}
inline int computed_here(int value) {
    return value;
}
inline int highest_bit(std::uint32_t value) {
    return 31 - __builtin_clz(value);
}

inline int lowest_bit(std::uint32_t value) {
    return __builtin_ctz(value);
}
inline std::uint32_t warp_match(int value) {
    struct Slot {
        int value;
        std::uint32_t result;
    } slot{value, 0};
    emulation::meet_warp(&slot, [](void** slots) {
        for (int i = 0; i < 32; ++i) {
            Slot* const mine = static_cast<Slot*>(slots[i]);
            for (int j = 0; j < 32; ++j)
                mine->result |= static_cast<std::uint32_t>(static_cast<Slot*>(slots[j])->value == mine->value) << j;
        }
    });
    return slot.result;
}
inline std::uint32_t warp_highest(std::uint32_t value) {
    for (int half = 16; half > 0; half /= 2) {
        const std::uint32_t other = warp_xor(value, half);
        value = value > other ? value : other;
    }
    return value;
}
inline std::uint32_t warp_lowest(std::uint32_t value) {
    return ~warp_highest(~value);
}

inline int atomic_add(int* to, int value) {
    const int old = *to;
    *to = old + value;
    return old;
}
inline float atomic_add(float* to, float value) {
    const float old = *to;
    *to = old + value;
    return old;
}
inline void atomic_add(std::int64_t* to, std::int64_t value) {
    *to += value;
}
inline void atomic_lower(std::int64_t* to, std::int64_t value) {
    *to = value < *to ? value : *to;
}
inline int load_acquire(const int* from) {
    emulation::pause();
    emulation::see_flag();
    return *from;
}
inline void store_release(int* to, int value) {
    *to = value;
}

// The build has -ffp-contract=off.
template <class T>
T rounded_product(T a, T b) {
    return a * b;
}
template <class T>
T rounded_sum(T a, T b) {
    return a + b;
}

inline float bits_as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline std::uint32_t float_as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline double bits_as_double(std::uint64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline std::uint64_t double_as_bits(double value) {
    std::uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline std::int64_t rounded(double value) {
    return std::llrint(value);
}
inline float fused(float x, float y, float z) {
    return std::fma(x, y, z);
}
inline double fused(double x, double y, double z) {
    return std::fma(x, y, z);
}
struct alignas(16) Word16 {
    std::uint32_t at[4];
};
template <class Word>
Word load_passing(const Word* from) {
    return *from;
}
template <class Word>
void store_passing(Word* to, Word word) {
    *to = word;
}
inline float fast_exp2(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;  // NaN passes
}
inline float fast_reciprocal(float x) {
    return 1.0f / x;
}
inline double normal_distribution(double x) {
    return 0.5 * std::erfc(-0.70710678118654752440 * x);
}
inline float normal_distribution(float x) {
    return static_cast<float>(normal_distribution(static_cast<double>(x)));
}
inline void sine_cosine(double x, double* sine, double* cosine) {
    *sine = std::sin(x);
    *cosine = std::cos(x);
}
inline std::uint16_t float_as_bf16_bits(float value) {
    const std::uint32_t bits = float_as_bits(value);
    if (value != value) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float half_bits_as_float(std::uint16_t bits);
std::uint16_t float_as_half_bits(float value);
inline std::uint32_t pack_bf16_pair(float low, float high) {
    return float_as_bf16_bits(low) | static_cast<std::uint32_t>(float_as_bf16_bits(high)) << 16;
}
inline std::uint32_t pack_half_pair(float low, float high) {
    return float_as_half_bits(low) | static_cast<std::uint32_t>(float_as_half_bits(high)) << 16;
}

// What CUDA's own library has under these names.
using std::erfc;
using std::exp;
using std::exp2;
using std::fma;
using std::isfinite;
using std::log;
using std::log2;
using std::sqrt;
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
    return 1.0 / std::sqrt(x);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t x, std::int64_t y, std::int64_t z, int n_threads,
            std::int64_t shared_bytes, Stream, Arguments... arguments) {
    emulation::run_grid(x, y, z, n_threads, shared_bytes, [&] { kernel(arguments...); });
}
inline void zero_memory(void* to, std::int64_t n_bytes, Stream) {
    std::memset(to, 0, static_cast<std::size_t>(n_bytes));
}
inline int multiprocessors() {
    return 4;
}
inline int compute_capability() {
    return 90;
}
std::uint32_t shared_address(const void* pointer);

}  // namespace fivedp
