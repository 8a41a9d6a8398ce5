// AVX-512: 14 x 2 vectors, 28 of 32 registers hold C.
#define FIVEDP_ISA avx512
#define FIVEDP_VECTOR_BYTES 64
#define FIVEDP_TILE_ROWS 14
#define FIVEDP_ATTENTION_ROWS 6
#define FIVEDP_ATTENTION_VECTORS 4
#include "cpu/isa_kernels.hpp"
