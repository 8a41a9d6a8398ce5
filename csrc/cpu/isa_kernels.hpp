// Compiles the kernels for one instruction set. The file that includes this sets
//
//     FIVEDP_ISA            the namespace and the name
//     FIVEDP_VECTOR_BYTES   width of a vector
//     FIVEDP_TILE_ROWS, FIVEDP_TILE_VECTORS
//                           rows and vectors of the register tile
//     FIVEDP_ATTENTION_ROWS, FIVEDP_ATTENTION_VECTORS
//                           rows and vectors of attention's register tile over lanes of queries
//     FIVEDP_BF16_PAIRS     defined where an instruction multiplies pairs of bfloat16
//
// and is compiled with that instruction set's flags. Everything lies in a namespace of the same name, inside an unnamed
// one, and no standard library function is called: an inline function shared with other files could be kept in
// this file's version by the linker, and then run on a machine that cannot execute it.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/attention_problem.hpp"
#include "cpu/copy_problem.hpp"
#include "cpu/experts_problem.hpp"
#include "cpu/gemm_problem.hpp"
#include "cpu/kernel_table.hpp"
#include "cpu/routing_problem.hpp"

// Room for k in a packed row or panel.
#ifndef FIVEDP_PASS_K
#define FIVEDP_PASS_K 256
#endif
// Of a strip of A, packed: a quarter of the L2 cache.
#ifndef FIVEDP_STRIP_BYTES
#define FIVEDP_STRIP_BYTES (FIVEDP_VECTOR_BYTES >= 64 ? 288 * 1024 : 144 * 1024)
#endif
// Passes that go over a strip together.
#ifndef FIVEDP_ROUND_PASSES
#define FIVEDP_ROUND_PASSES 2
#endif

namespace fivedp {
namespace FIVEDP_ISA {
namespace {

#include "cpu/vec.hpp"
// (in this order)
#include "cpu/finish.hpp"
#include "cpu/microkernel.hpp"
#include "cpu/pack.hpp"
#include "cpu/stream.hpp"
// (built on the above)
#include "cpu/gemm.hpp"
#include "cpu/peak.hpp"
#include "cpu/tree_sum.hpp"
// (boxes)
#include "cpu/copy.hpp"
// (attention)
#include "cpu/vec_math.hpp"
// (in this order)
#include "cpu/attention_products.hpp"
// (in this order)
#include "cpu/attention_rows.hpp"
// (in this order)
#include "cpu/attention_tiles.hpp"
// (in this order)
#include "cpu/attention_forward.hpp"
// (in this order)
#include "cpu/attention_backward.hpp"
// (routing)
#include "cpu/routing_rows.hpp"
// (in this order)
#include "cpu/routing_best.hpp"
// (in this order)
#include "cpu/routing_scores.hpp"
// (in this order)
#include "cpu/routing.hpp"
// (experts)
#include "cpu/activations.hpp"
// (in this order)
#include "cpu/experts.hpp"

template <class E>
constexpr GemmKernel gemm_kernel() {
    return {tile_rows,          tile_columns<typename E::Acc>,
            E::unit_k,          sizeof(typename E::Unit),
            pass_units<E>,      sizeof(typename E::Acc),
            FIVEDP_STRIP_BYTES, FIVEDP_ROUND_PASSES,
            stream_most_rows,   &gemm_block<E>,
            &stream_block<E>};
}

template <class E>
constexpr AttentionKernel attention_kernel() {
    return {forward_rows,
            backward_rows,
            &attention_forward_bytes<E>,
            &attention_forward<E>,
            &attention_backward_bytes<E>,
            &attention_backward<E>};
}

template <class T>
constexpr RoutingKernel routing_kernel() {
    return {routing_lanes<T>, &routing_scratch_bytes<T>, &routing_forward<T>, &routing_backward<T>};
}

// Attention's kernel of float32 widens bfloat16 as it packs it.
#ifdef FIVEDP_BF16_PAIRS
using Bf16Engine = Bf16PairsEngine;
using Bf16AttentionEngine = Bf16PairsEngine;
#else
using Bf16Engine = Bf16WidenedEngine;
using Bf16AttentionEngine = F32Engine;
#endif

}  // namespace

#define FIVEDP_TEXT_OF(name) #name
#define FIVEDP_TEXT(name) FIVEDP_TEXT_OF(name)

extern const KernelTable table;
constexpr KernelTable table = {FIVEDP_TEXT(FIVEDP_ISA),
                               gemm_kernel<F32Engine>(),
                               gemm_kernel<F64Engine>(),
                               gemm_kernel<Bf16Engine>(),
                               &multiply_adds<F32Engine>,
                               &multiply_adds<F64Engine>,
                               &multiply_adds<Bf16Engine>,
                               &tree_sum,
                               &copy_rows,
                               attention_kernel<F32Engine>(),
                               attention_kernel<F64Engine>(),
                               attention_kernel<Bf16AttentionEngine>(),
                               routing_kernel<float>(),
                               routing_kernel<double>(),
                               {&activate, &activation_gradient, &combine, &weighted_rows, &row_dots}};

}  // namespace FIVEDP_ISA
}  // namespace fivedp
