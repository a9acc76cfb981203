// Chooses the CPU kernels for the processor that runs the program.
#pragma once

#include <string>

#include "kernels.h"

namespace maskdino {
namespace cpu {

// The best kernels that the processor can run. The environment variable MASKDINO_CPU_CAPABILITY
// (plain, avx2 or avx512), read once, names the best that may be used. Of each kind:
// `Kernels<float>`, `Kernels<double>`, `MaskKernel`.
template <typename Kind>
Kind choose_kernels();

// "AVX-512", "AVX2" or "plain".
std::string instruction_set_name();

}  // namespace cpu
}  // namespace maskdino
