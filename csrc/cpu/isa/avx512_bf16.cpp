// AVX-512 with the bfloat16 dot product: 9 x 3 vectors. Its bfloat16 sums pairs with the instruction's own rounding,
// so their bits are this instruction set's own, of products and of attention; the other types give the same bits as
// everywhere.
#define FIVEDP_ISA avx512_bf16
#define FIVEDP_VECTOR_BYTES 64
#define FIVEDP_TILE_ROWS 9
#define FIVEDP_TILE_VECTORS 3
#define FIVEDP_ATTENTION_ROWS 6
#define FIVEDP_ATTENTION_VECTORS 4
#define FIVEDP_BF16_PAIRS 1
#include "cpu/isa_kernels.hpp"
