// Matrix instructions of compute capability 8.0 and the copies that feed them, with the layout of their registers.
//
// In a warp, lane = 4 * group + pair. An accumulator of 16 x 8 floats: d[0], d[1] are row `group`, columns 2 * pair and
// 2 * pair + 1; d[2], d[3] the same columns of row group + 8. The A operand of m16n8k16 (pairs of 16-bit values along
// k): a[0] row group, k = 2 * pair, + 1; a[1] row group + 8; a[2], a[3] the same rows, k + 8. B: b[0] column group,
// k = 2 * pair, + 1; b[1] k + 8. So two accumulators side by side, rounded to pairs, are an A operand.
// m16n8k8 of TF32: a[0] row group, k = pair; a[1] row group + 8; a[2], a[3] k + 4; b[0] k = pair, b[1] k = pair + 4.
// (PTX ISA, "Matrix fragments for mma.m16n8k16" and "for mma.m16n8k8".)
#pragma once

#include "cuda/elements.cuh"

namespace fivedp {

#ifndef FIVEDP_CUDA_EMULATED

FIVEDP_DEVICE std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory behind the thread's back; the first `n` come from `from`, the others are 0.
FIVEDP_DEVICE void copy_async_16(void* to, const void* from, int n) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(n)
                 : "memory");
}
// All copies since the last call are one group.
FIVEDP_DEVICE void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `pending` of this thread's groups are under way; other threads' copies need a barrier as well.
template <int pending>
FIVEDP_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values: lanes 8 i .. 8 i + 7 say where the rows (16 bytes each) of matrix i lie.
// Register i has row `group`, columns 2 * pair and 2 * pair + 1 of matrix i.
FIVEDP_DEVICE void warp_load_matrices(std::uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same of the transposed matrices: rows 2 * pair and 2 * pair + 1, column `group`.
FIVEDP_DEVICE void warp_load_transposed(std::uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Either of the two, chosen at run time without a branch; `transposed` is the same in all lanes.
FIVEDP_DEVICE void warp_load_either(std::uint32_t (&to)[4], const void* row, bool transposed) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.s32 p, %5, 0;\n"
        "@p ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
        "@!p ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
        : "r"(shared_address(row)), "r"(static_cast<int>(transposed))
        : "memory");
}

// d += a b, with products and sums in float.
template <class T>
FIVEDP_DEVICE void warp_multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
template <>
FIVEDP_DEVICE void warp_multiply<Bf16>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FIVEDP_DEVICE void warp_multiply<Half>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounded to the 10 bits of mantissa that TF32 multiplies, ties away from zero.
FIVEDP_DEVICE std::uint32_t as_tf32(float value) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}
FIVEDP_DEVICE void warp_multiply_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// m8n8k4 of doubles: `a` is row group, k = pair; `b` is k = pair, column group; d0, d1 are row group, columns 2 * pair
// and 2 * pair + 1.
FIVEDP_DEVICE void warp_multiply_f64(double& d0, double& d1, double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(d0), "+d"(d1)
                 : "d"(a), "d"(b));
}

#else
#include "cuda/emulation/matrix.hpp"
#endif

// Sum and maximum over the four lanes of a group, which have a row of an accumulator among them.
FIVEDP_DEVICE float row_sum(float value) {
    value += warp_xor(value, 1);
    return value + warp_xor(value, 2);
}
FIVEDP_DEVICE float row_max(float value) {
    float other = warp_xor(value, 1);
    value = value > other ? value : other;
    other = warp_xor(value, 2);
    return value > other ? value : other;
}

}  // namespace fivedp
