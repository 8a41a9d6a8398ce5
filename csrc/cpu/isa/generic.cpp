// Any machine: 16-byte vectors in the compiler's own words. Fused multiply-add through fma(), which is exact (and slow)
// where the machine has no such instruction, so the bits are those of every other instruction set.
#define FIVEDP_ISA generic
#define FIVEDP_VECTOR_BYTES 16
#define FIVEDP_TILE_ROWS 6
#define FIVEDP_TILE_VECTORS 2
#define FIVEDP_ATTENTION_ROWS 6
#define FIVEDP_ATTENTION_VECTORS 2
#include "cpu/isa_kernels.hpp"
