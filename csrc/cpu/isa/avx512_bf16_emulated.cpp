// For tests: the tiles and pairs of avx512_bf16, compiled for AVX2.
#define FIVEDP_ISA avx512_bf16_emulated
#define FIVEDP_VECTOR_BYTES 64
#define FIVEDP_TILE_ROWS 9
#define FIVEDP_TILE_VECTORS 3
#define FIVEDP_ATTENTION_ROWS 6
#define FIVEDP_ATTENTION_VECTORS 4
#define FIVEDP_BF16_PAIRS 1
#include "cpu/isa_kernels.hpp"
