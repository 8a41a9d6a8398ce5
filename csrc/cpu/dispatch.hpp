// The kernel table in use: chosen once, by the CPU or by FIVEDP_ISA.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel_table.hpp"

namespace fivedp {

// Throws std::invalid_argument where FIVEDP_ISA names an instruction set that this machine or build does not have.
const KernelTable& kernels();

// Names that FIVEDP_ISA may take here, the widest last. Emulated ones (test builds) are never chosen unasked.
std::vector<std::string> supported_isas();

}  // namespace fivedp
