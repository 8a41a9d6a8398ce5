// What the products of cuda/gemm.cu and cuda/grouped_gemm.cu are asked for, as plain data that the kernels read as it
// is; functions that start them.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// A factor, as rows of elements: row r begins at the address rows[r], or at data + r * row_stride where rows is null.
// Strides are in bytes. A row is a k of the product (rows_along_k), or a row of A or a column of B.
struct GemmOperand {
    const char* data;
    const std::int64_t* rows;
    std::int64_t row_stride, column_stride;
    std::int64_t batch_stride;  // from matrix to matrix of a batch, or from expert to expert
    std::int64_t k_before;      // elements along k that the array has before `data`: this may be a part of it
    int rows_along_k;
    int vectors;  // elements of a row are contiguous and all rows begin at multiples of 16 bytes
};

struct GemmResult {
    char* data;                                            // null: not wanted
    std::int64_t row_stride, column_stride, batch_stride;  // bytes
    int is_sum;                                            // in the type of sums rather than in that of the factors
};

// A part of k that lies in one array of A and one of B. `merges` is -1 within a virtual shard; at its end the number of
// open sums that the shard's sum is added to (cpu/sum_plan.hpp has the tree).
struct GemmSegment {
    GemmOperand a, b;
    std::int64_t first_k, k;
    int merges;
};

// All of it is passed as a kernel's parameter.
constexpr int max_gemm_segments = 24;

// C = alpha * A B + beta * C.
struct GemmProblem {
    DeviceType type;
    int n_segments;
    GemmSegment segments[max_gemm_segments];
    GemmResult c;
    std::int64_t batch, m, n;
    double alpha, beta;
    // ready[i] becomes other than 0 when panel i of `panel` k (or rows of A) may be read; null: all may be.
    const int* ready;
    std::int64_t panel;
    int ready_along_m;
    void* workspace;  // for open sums: gemm_workspace() bytes for all multiprocessors to work, fewer for fewer
    std::int64_t workspace_bytes;
    int n_open;  // sums that are open at a time
};
// Returns which kernel it was, "sm80" or "sm90". The latter only where `hopper` asks for it, the chip has its
// instructions and the factors have 16 bits: whatever differs from rank to rank, sizes and addresses, chooses nothing.
const char* gemm(const GemmProblem& problem, bool hopper, Stream stream);
std::int64_t gemm_workspace(DeviceType type, bool hopper, std::int64_t batch, std::int64_t m, std::int64_t n,
                            int n_open);
// Of 128 bytes of a row: k within a virtual shard is cut at multiples of this.
constexpr int gemm_depth(DeviceType type) {
    return type == DeviceType::f64 ? 16 : type == DeviceType::f32 ? 32 : 64;
}

enum class GroupedKind : int { matmul, outer, hidden };
constexpr int max_grouped_pieces = 8;

// Group e is the rows offsets[e] <= i < offsets[e + 1]; the offsets are read on the device.
// matmul: out[i] = sum over pieces of x[i] w[e]. outer: out[e] = x_e^T y_e, with y in w[0]. hidden:
// out = activation(x w[0]) * (x up), or activation(x w[0]) without `gated`.
struct GroupedProblem {
    DeviceType type;
    GroupedKind kind;
    const std::int64_t* offsets;
    std::int64_t n_experts, n_rows;
    int n_pieces;
    GemmOperand x[max_grouped_pieces], w[max_grouped_pieces];
    std::int64_t k[max_grouped_pieces];  // not for outer
    std::int64_t m, n;                   // of out[e] for outer; n columns otherwise
    GemmResult out;
    int gated;
    GemmOperand up_weights;
    GemmResult gate, up;  // where the two products are kept
    Activation activation;
};
// Returns which kernel it was, chosen as gemm() does.
const char* grouped_product(const GroupedProblem& problem, bool hopper, Stream stream);

// What the two choose from. False: not started, because of the chip or the type.
bool gemm_sm90(const GemmProblem& problem, Stream stream);
std::int64_t gemm_workspace_sm90(std::int64_t batch, std::int64_t m, std::int64_t n, int n_open);
bool grouped_product_sm90(const GroupedProblem& problem, Stream stream);

}  // namespace fivedp
