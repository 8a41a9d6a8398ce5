// What compute capability 9.0 has of its own: barriers in shared memory, boxes of a tensor that the copy engine (TMA)
// brings there, and products of a warpgroup (wgmma), with the layout of their operands.
//
// A warpgroup is four warps, of which the first one's number is a multiple of 4; functions whose name ends in
// `_product` or `_products` are called by all of its 128 threads together.
//
// Swizzle. The copy engine puts a box of rows of 128 bytes to a multiple of 1024; chunk c (16 bytes) of row r lies at
// place c ^ (r % 8) of the row. The tensor cores undo this by the address: bits 4 to 6 are xored with bits 7 to 9. So a
// matrix may begin inside a row, at a multiple of 32 bytes, or at any multiple of 8 rows. A tile of rows longer than
// that is several boxes, panels of 64 columns each.
//
// Accumulators. Warp w of the group has rows 16 w .. 16 w + 15 of the 64; d[j] are their columns 8 j .. 8 j + 7, laid
// out as matrix.cuh says of an accumulator of 16 x 8, and a left factor in registers as it says of A of m16n8k16.
// (PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate", "Tensors", "mbarrier".)
#pragma once

#include "cuda/matrix.cuh"

#ifndef FIVEDP_CUDA_EMULATED
#include <cuda.h>  // types only: nothing of the driver's library is linked
#endif

// Kernels whose instructions only chips of capability 9.x have are compiled for these alone (and for the emulation);
// for others their body is a trap, which the host does not let them reach.
#if defined(FIVEDP_CUDA_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FIVEDP_HOPPER 1
#endif

namespace fivedp {

constexpr int swizzle_bytes = 1024, panel_columns = 64;  // of 16-bit elements, 128 bytes

// A matrix of 16-bit elements in shared memory as wgmma is told of it: where it begins, and two steps in bytes.
//
// Rows of k (K-major): 64 elements of k a row, `group` from 8 rows to the next 8; `panel` is not used.
// Columns of k (the other way round): 64 elements of m or n a row, `group` from 8 rows, which are 8 of k, to the next
// 8, `panel` from 64 elements of m or n to the next 64.
FIVEDP_DEVICE std::uint64_t swizzled_matrix(const void* start, int group, int panel) {
    constexpr std::uint64_t swizzle_128_bytes = std::uint64_t{1} << 62;
    return swizzle_128_bytes | static_cast<std::uint64_t>(group >> 4) << 32 |
           static_cast<std::uint64_t>(panel >> 4) << 16 | (shared_address(start) >> 4 & 0x3fff);
}
// The same, `bytes` further on.
FIVEDP_DEVICE std::uint64_t further(std::uint64_t matrix, int bytes) {
    return matrix + static_cast<std::uint64_t>(bytes >> 4);
}

// Rows of `size` contiguous elements, of which boxes of (rows, 64) are copied; what lies outside is copied as zeros.
// `counts` and `steps` (in bytes) are those of tokens, heads and sequences.
struct BoxedTensor {
    DeviceType type;
    const void* data;
    std::int64_t size, counts[3], steps[3];
    int rows;
};

#ifndef FIVEDP_CUDA_EMULATED

#define FIVEDP_GRID_CONSTANT __grid_constant__

// A barrier in shared memory that counts arrivals and bytes. Its phases have parities 0, 1, 0, ...; a thread may wait
// for the one that is under way or for the one before it, not for others.
struct alignas(8) Barrier {
    std::uint64_t bits;
};

FIVEDP_DEVICE void init_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the initialisation, by the thread that did it, before a barrier of the block.
FIVEDP_DEVICE void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
FIVEDP_DEVICE void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives; the phase then also waits for so many bytes of copies.
FIVEDP_DEVICE void arrive_expecting(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// The phase that is under way waits for so many bytes more. Not an arrival.
FIVEDP_DEVICE void expect_bytes(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.expect_tx.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
FIVEDP_DEVICE void wait_for_phase(Barrier* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Copies a box to shared memory, from the given element, token, head and sequence; `barrier` counts its bytes.
using TensorMap = CUtensorMap;
FIVEDP_DEVICE void copy_box(void* to, const TensorMap* map, Barrier* barrier, int element, int token, int head,
                            int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(shared_address(to)),
        "l"(map), "r"(element), "r"(token), "r"(head), "r"(batch), "r"(shared_address(barrier))
        : "memory");
}
// What this thread wrote to shared memory is seen by the copy engine and the tensor cores after the next barrier.
FIVEDP_DEVICE void publish_to_products() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread knows to have been written to global memory is seen by the boxes that it copies from here on.
FIVEDP_DEVICE void show_to_boxes() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// A barrier of some warps of the block, `n` threads in all, by number (0 is sync_block's). Who arrives does not wait.
FIVEDP_DEVICE void sync_some(int number, int n) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(number), "r"(n) : "memory");
}
FIVEDP_DEVICE void arrive_some(int number, int n) {
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(number), "r"(n) : "memory");
}

// Registers of a thread from here on, for all warps of a warpgroup.
template <int n>
FIVEDP_DEVICE void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n>
FIVEDP_DEVICE void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

// Before products: registers that were written, accumulators or factors, may be read by them. `settle` goes before it.
FIVEDP_DEVICE void open_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// All products since the last call are one group.
FIVEDP_DEVICE void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `pending` groups are under way. The registers of the others may be touched after `settle`.
template <int pending>
FIVEDP_DEVICE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving accesses of registers over this place.
template <int n>
FIVEDP_DEVICE void settle(float (&d)[n][4]) {
    FIVEDP_UNROLL
    for (int j = 0; j < n; ++j) asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}
template <int n>
FIVEDP_DEVICE void settle(std::uint32_t (&a)[n][4]) {
    FIVEDP_UNROLL
    for (int k = 0; k < n; ++k) asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
}

// start_product(T{}, d, a, b, add): d = a b^T (+ d where `add`), a: 64 x 16 and b: n x 16, both rows of k; with
// <true, ..> a is columns of k, with <.., true> b is.
// start_product(T{}, d, a, b): d += a b, a: 64 x 16 in registers or rows of k, b: 16 x n, columns of k.
#define FIVEDP_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FIVEDP_NAMES_32 \
    FIVEDP_NAMES_16     \
    ", "                \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FIVEDP_NAMES_64                                                                               \
    FIVEDP_NAMES_32                                                                                   \
    ", "                                                                                              \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
    "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FIVEDP_NAMES_96                                                                               \
    FIVEDP_NAMES_64                                                                                   \
    ", "                                                                                              \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
    "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FIVEDP_NAMES_128                                                                                 \
    FIVEDP_NAMES_96                                                                                      \
    ", "                                                                                                 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
    "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FIVEDP_SUMS_8(d, j)                                                                           \
    "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), "+f"(d[j + 1][0]), "+f"(d[j + 1][1]), \
        "+f"(d[j + 1][2]), "+f"(d[j + 1][3])
#define FIVEDP_SUMS_16(d, j) FIVEDP_SUMS_8(d, j), FIVEDP_SUMS_8(d, j + 2)
#define FIVEDP_SUMS_32(d, j) FIVEDP_SUMS_16(d, j), FIVEDP_SUMS_16(d, j + 4)
#define FIVEDP_SUMS_64(d, j) FIVEDP_SUMS_32(d, j), FIVEDP_SUMS_32(d, j + 8)
#define FIVEDP_SUMS_96(d, j) FIVEDP_SUMS_64(d, j), FIVEDP_SUMS_32(d, j + 16)
#define FIVEDP_SUMS_128(d, j) FIVEDP_SUMS_64(d, j), FIVEDP_SUMS_64(d, j + 16)

// `sums` registers of accumulators, 2 * sums columns; the operands after them by their names.
#define FIVEDP_PRODUCT_OF_SHARED(T, type, columns, sums, a_name, b_name, add_name, a_way, b_way)                     \
    template <bool a_columns = false, bool b_columns = false>                                                        \
    FIVEDP_DEVICE void start_product(T, float(&d)[columns / 8][4], std::uint64_t a, std::uint64_t b, bool add) {     \
        asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, " add_name ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns \
                     "k16.f32." type "." type " {" FIVEDP_NAMES_##sums "}, " a_name ", " b_name ", p, 1, 1, " a_way  \
                                                                       ", " b_way ";\n}"                             \
                     : FIVEDP_SUMS_##sums(d, 0)                                                                      \
                     : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(a_columns)),                 \
                       "n"(static_cast<int>(b_columns)));                                                            \
    }
#define FIVEDP_PRODUCT_OF_REGISTERS(T, type, columns, sums, a_names, b_name)                                          \
    FIVEDP_DEVICE void start_product(T, float(&d)[columns / 8][4], const std::uint32_t(&a)[4], std::uint64_t b) {     \
        asm volatile("{\n.reg .pred p;\nsetp.eq.s32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #columns             \
                     "k16.f32." type "." type " {" FIVEDP_NAMES_##sums "}, {" a_names "}, " b_name ", p, 1, 1, 1;\n}" \
                     : FIVEDP_SUMS_##sums(d, 0)                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
    }
#define FIVEDP_PRODUCTS(T, type)                                                        \
    FIVEDP_PRODUCT_OF_SHARED(T, type, 32, 16, "%16", "%17", "%18", "%19", "%20")        \
    FIVEDP_PRODUCT_OF_SHARED(T, type, 64, 32, "%32", "%33", "%34", "%35", "%36")        \
    FIVEDP_PRODUCT_OF_SHARED(T, type, 128, 64, "%64", "%65", "%66", "%67", "%68")       \
    FIVEDP_PRODUCT_OF_SHARED(T, type, 256, 128, "%128", "%129", "%130", "%131", "%132") \
    FIVEDP_PRODUCT_OF_REGISTERS(T, type, 64, 32, "%32, %33, %34, %35", "%36")           \
    FIVEDP_PRODUCT_OF_REGISTERS(T, type, 128, 64, "%64, %65, %66, %67", "%68")          \
    FIVEDP_PRODUCT_OF_REGISTERS(T, type, 192, 96, "%96, %97, %98, %99", "%100")         \
    FIVEDP_PRODUCT_OF_REGISTERS(T, type, 256, 128, "%128, %129, %130, %131", "%132")
FIVEDP_PRODUCTS(Bf16, "bf16")
FIVEDP_PRODUCTS(Half, "f16")
template <class T, int n>
FIVEDP_DEVICE void start_product(T, float (&d)[n][4], std::uint64_t a, std::uint64_t b) {
    start_product<false, true>(T{}, d, a, b, true);
}
#undef FIVEDP_PRODUCTS
#undef FIVEDP_PRODUCT_OF_REGISTERS
#undef FIVEDP_PRODUCT_OF_SHARED
#undef FIVEDP_SUMS_128
#undef FIVEDP_SUMS_96
#undef FIVEDP_SUMS_64
#undef FIVEDP_SUMS_32
#undef FIVEDP_SUMS_16
#undef FIVEDP_SUMS_8
#undef FIVEDP_NAMES_128
#undef FIVEDP_NAMES_96
#undef FIVEDP_NAMES_64
#undef FIVEDP_NAMES_32
#undef FIVEDP_NAMES_16

// Ends the kernel with an error.
FIVEDP_DEVICE void trap() {
    __trap();
}
// Whether the code that would run has a kernel's instructions of capability 9.x, not a trap in their place, which needs
// few registers: the extension may have been built for other chips.
template <class Kernel>
bool built_for_hopper(Kernel kernel) {
    cudaFuncAttributes found{};
    check_cuda(cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel)), "asking for a kernel's registers");
    return found.numRegs > 64;
}

// The copy engine's description of a tensor, made by the driver, which is asked for its function at run time.
inline TensorMap tensor_map(const BoxedTensor& tensor) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        check_cuda(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
            "asking the driver for cuTensorMapEncodeTiled");
        if (found != cudaDriverEntryPointSuccess)
            throw std::runtime_error(
                "the driver has no cuTensorMapEncodeTiled; one for CUDA 12 or later would be right");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    cuuint64_t counts[4] = {static_cast<cuuint64_t>(tensor.size)}, steps[3];
    for (int i = 0; i < 3; ++i) {
        counts[i + 1] = static_cast<cuuint64_t>(tensor.counts[i]);
        steps[i] = static_cast<cuuint64_t>(tensor.steps[i]);
    }
    const cuuint32_t box[4] = {panel_columns, static_cast<cuuint32_t>(tensor.rows), 1, 1}, every[4] = {1, 1, 1, 1};
    TensorMap map;
    const CUresult status = encode(
        &map, tensor.type == DeviceType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
        const_cast<void*>(tensor.data), counts, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)));
    return map;
}

#else
#include "cuda/emulation/hopper.hpp"
#endif

// The block's shared memory as an S, from the first multiple of 1024 on.
template <class S>
FIVEDP_DEVICE S& shared_from_boundary() {
    char* const from = dynamic_shared();
    const int over = static_cast<int>(shared_address(from) % swizzle_bytes);
    return *reinterpret_cast<S*>(from + (over > 0 ? swizzle_bytes - over : 0));
}

// A place in a ring of stages, and the parity of the phase that it is in.
template <int stages>
struct Turn {
    int stage = 0, parity = 0;

    FIVEDP_DEVICE void next() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace fivedp
