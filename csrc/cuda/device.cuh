// What kernels need of a GPU, as functions with names. The same kernel source is compiled by nvcc for the GPU and, for
// tests on machines without one, by a C++ compiler for an emulation that runs every thread of a block as a fiber
// (cuda/emulation/device.hpp has the same functions).
//
// Every function whose name begins with `warp_` is called by all 32 lanes of a warp together.
#pragma once

#ifdef FIVEDP_CUDA_EMULATED
#include "cuda/emulation/device.hpp"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device_type.hpp"

// A kernel of so many threads a block, at least so many blocks on a multiprocessor at a time.
#define FIVEDP_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FIVEDP_DEVICE __device__ __forceinline__
#define FIVEDP_HOST_DEVICE __host__ __device__ __forceinline__
#define FIVEDP_SHARED __shared__
#define FIVEDP_UNROLL _Pragma("unroll")
#define FIVEDP_NO_UNROLL _Pragma("unroll 1")

namespace fivedp {

FIVEDP_DEVICE int thread() {
    return static_cast<int>(threadIdx.x);
}
FIVEDP_DEVICE int lane() {
    return static_cast<int>(threadIdx.x) & 31;
}
// The same value in all lanes, which the compiler can not see of threadIdx.
FIVEDP_DEVICE int warp() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) >> 5, 0);
}
FIVEDP_DEVICE int threads() {
    return static_cast<int>(blockDim.x);
}
FIVEDP_DEVICE std::int64_t block_x() {
    return static_cast<std::int64_t>(blockIdx.x);
}
FIVEDP_DEVICE std::int64_t block_y() {
    return static_cast<std::int64_t>(blockIdx.y);
}
FIVEDP_DEVICE std::int64_t block_z() {
    return static_cast<std::int64_t>(blockIdx.z);
}
FIVEDP_DEVICE std::int64_t blocks_x() {
    return static_cast<std::int64_t>(gridDim.x);
}

// Shared memory whose size the launch chooses; 128-byte aligned.
FIVEDP_DEVICE char* dynamic_shared() {
    extern __shared__ __align__(128) char fivedp_dynamic_shared[];
    return fivedp_dynamic_shared;
}

FIVEDP_DEVICE void sync_block() {
    __syncthreads();
}
FIVEDP_DEVICE void warp_sync() {
    __syncwarp();
}
template <class T>
FIVEDP_DEVICE T warp_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
FIVEDP_DEVICE T warp_from(T value, int source_lane) {
    return __shfl_sync(0xffffffffu, value, source_lane);
}
template <class T>
FIVEDP_DEVICE T warp_up(T value, int distance) {
    return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(distance));
}
FIVEDP_DEVICE std::uint32_t warp_ballot(bool value) {
    return __ballot_sync(0xffffffffu, value);
}
FIVEDP_DEVICE int count_bits(std::uint32_t value) {
    return __popc(value);
}
// The same number, but what is made of it in a loop is made there each time: where there are many addresses, kept ones
// would take the registers of sums.
FIVEDP_DEVICE int computed_here(int value) {
    asm volatile("" : "+r"(value));
    return value;
}
// Of a number that is not 0.
FIVEDP_DEVICE int highest_bit(std::uint32_t value) {
    return 31 - __clz(static_cast<int>(value));
}
// The place of the lowest bit that is set; value is not 0.
FIVEDP_DEVICE int lowest_bit(std::uint32_t value) {
    return __ffs(static_cast<int>(value)) - 1;
}
// The lanes that have the same value.
FIVEDP_DEVICE std::uint32_t warp_match(int value) {
    return __match_any_sync(0xffffffffu, value);
}
FIVEDP_DEVICE std::uint32_t warp_highest(std::uint32_t value) {
    return __reduce_max_sync(0xffffffffu, value);
}
FIVEDP_DEVICE std::uint32_t warp_lowest(std::uint32_t value) {
    return __reduce_min_sync(0xffffffffu, value);
}

FIVEDP_DEVICE int atomic_add(int* to, int value) {
    return atomicAdd(to, value);
}
FIVEDP_DEVICE float atomic_add(float* to, float value) {
    return atomicAdd(to, value);
}
FIVEDP_DEVICE void atomic_add(std::int64_t* to, std::int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
FIVEDP_DEVICE void atomic_lower(std::int64_t* to, std::int64_t value) {
    atomicMin(reinterpret_cast<long long*>(to), static_cast<long long>(value));
}
// What other blocks wrote before they raised a flag is seen after it was read.
FIVEDP_DEVICE int load_acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
FIVEDP_DEVICE void store_release(int* to, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// a b and a + b rounded as they stand: the compiler fuses them with nothing.
FIVEDP_DEVICE float rounded_product(float a, float b) {
    return __fmul_rn(a, b);
}
FIVEDP_DEVICE double rounded_product(double a, double b) {
    return __dmul_rn(a, b);
}
FIVEDP_DEVICE float rounded_sum(float a, float b) {
    return __fadd_rn(a, b);
}
FIVEDP_DEVICE double rounded_sum(double a, double b) {
    return __dadd_rn(a, b);
}

// 2^x to 2 ulp, with subnormal results flushed.
FIVEDP_DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x to 1 ulp, of numbers that are not subnormal.
FIVEDP_DEVICE float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The normal distribution, P(X <= x), to 5 ulp.
FIVEDP_DEVICE float normal_distribution(float x) {
    return normcdff(x);
}
FIVEDP_DEVICE double normal_distribution(double x) {
    return normcdf(x);
}
FIVEDP_DEVICE void sine_cosine(double x, double* sine, double* cosine) {
    sincos(x, sine, cosine);
}
FIVEDP_DEVICE float bits_as_float(std::uint32_t bits) {
    return __uint_as_float(bits);
}
FIVEDP_DEVICE std::uint32_t float_as_bits(float value) {
    return __float_as_uint(value);
}
FIVEDP_DEVICE double bits_as_double(std::uint64_t bits) {
    return __longlong_as_double(static_cast<long long>(bits));
}
FIVEDP_DEVICE std::uint64_t double_as_bits(double value) {
    return static_cast<std::uint64_t>(__double_as_longlong(value));
}
// To nearest, ties to even.
FIVEDP_DEVICE std::int64_t rounded(double value) {
    return __double2ll_rn(value);
}
// x y + z, rounded once.
FIVEDP_DEVICE float fused(float x, float y, float z) {
    return __fmaf_rn(x, y, z);
}
FIVEDP_DEVICE double fused(double x, double y, double z) {
    return __fma_rn(x, y, z);
}
FIVEDP_DEVICE float half_bits_as_float(std::uint16_t bits) {
    return __half2float(__ushort_as_half(bits));
}
FIVEDP_DEVICE std::uint16_t float_as_half_bits(float value) {
    return __half_as_ushort(__float2half_rn(value));
}
FIVEDP_DEVICE std::uint16_t float_as_bf16_bits(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
FIVEDP_DEVICE std::uint32_t pack_bf16_pair(float low, float high) {
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
FIVEDP_DEVICE std::uint32_t pack_half_pair(float low, float high) {
    std::uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// 16, 4 or 2 bytes as they are. A load that leaves the L1 cache alone, and a store that is the first to leave the L2
// cache: for rows that pass by once.
struct alignas(16) Word16 {
    std::uint32_t at[4];
};
FIVEDP_DEVICE Word16 load_passing(const Word16* from) {
    Word16 word;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.at[0]), "=r"(word.at[1]), "=r"(word.at[2]), "=r"(word.at[3])
                 : "l"(from));
    return word;
}
FIVEDP_DEVICE std::uint32_t load_passing(const std::uint32_t* from) {
    return *from;
}
FIVEDP_DEVICE std::uint16_t load_passing(const std::uint16_t* from) {
    return *from;
}
FIVEDP_DEVICE void store_passing(Word16* to, Word16 word) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.at[0]), "r"(word.at[1]),
                 "r"(word.at[2]), "r"(word.at[3])
                 : "memory");
}
FIVEDP_DEVICE void store_passing(std::uint32_t* to, std::uint32_t word) {
    *to = word;
}
FIVEDP_DEVICE void store_passing(std::uint16_t* to, std::uint16_t word) {
    *to = word;
}

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Starts a kernel; a grid without blocks starts none.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t x, std::int64_t y, std::int64_t z, int n_threads,
            std::int64_t shared_bytes, Stream stream, Arguments... arguments) {
    if (x <= 0 || y <= 0 || z <= 0) return;
    if (shared_bytes > 48 * 1024)
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
                   "more shared memory for a kernel");
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    // clang-format off
    kernel<<<grid, static_cast<unsigned>(n_threads), static_cast<std::size_t>(shared_bytes),
             static_cast<cudaStream_t>(stream)>>>(arguments...);
    // clang-format on
    check_cuda(cudaGetLastError(), "launch of a kernel");
}

// Sets memory to zero in the order of the stream.
inline void zero_memory(void* to, std::int64_t n_bytes, Stream stream) {
    if (n_bytes > 0)
        check_cuda(cudaMemsetAsync(to, 0, static_cast<std::size_t>(n_bytes), static_cast<cudaStream_t>(stream)),
                   "setting memory to zero");
}

inline int multiprocessors() {
    int device = 0, count = 0;
    check_cuda(cudaGetDevice(&device), "asking for the device");
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "counting multiprocessors");
    return count;
}

// 10 x major + minor: 80 for A100, 90 for H100 and H200.
inline int compute_capability() {
    int device = 0, major = 0, minor = 0;
    check_cuda(cudaGetDevice(&device), "asking for the device");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking what it can");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking what it can");
    return 10 * major + minor;
}

}  // namespace fivedp
#endif
