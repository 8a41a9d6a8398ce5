// AVX-512: 9 x 3 vectors, 27 of 32 registers hold C.
#define FIVEDP_ISA avx512
#define FIVEDP_VECTOR_BYTES 64
#define FIVEDP_TILE_ROWS 9
#define FIVEDP_TILE_VECTORS 3
#define FIVEDP_ATTENTION_ROWS 6
#define FIVEDP_ATTENTION_VECTORS 4
#include "cpu/isa_kernels.hpp"
