// AVX2 with FMA: 6 x 2 vectors, 12 of 16 registers hold C.
#define FIVEDP_ISA avx2
#define FIVEDP_VECTOR_BYTES 32
#define FIVEDP_TILE_ROWS 6
#define FIVEDP_TILE_VECTORS 2
#define FIVEDP_ATTENTION_ROWS 6
#define FIVEDP_ATTENTION_VECTORS 2
#include "cpu/isa_kernels.hpp"
