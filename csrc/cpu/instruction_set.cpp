#include "instruction_set.h"

#include <c10/util/Exception.h>

#include <cstdlib>

namespace maskdino {
namespace cpu {
namespace {

enum class InstructionSet { plain, avx2, avx512 };

InstructionSet detect_instruction_set() {
#if defined(__x86_64__)
  const char* cap = std::getenv("MASKDINO_CPU_CAPABILITY");
  const std::string limit = cap == nullptr ? "" : cap;
  TORCH_CHECK_VALUE(limit.empty() || limit == "plain" || limit == "avx2" || limit == "avx512",
                    "MASKDINO_CPU_CAPABILITY must be plain, avx2 or avx512, got ", limit);
  if (limit == "plain") return InstructionSet::plain;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx2 && avx512 && limit != "avx2") return InstructionSet::avx512;
  if (avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::plain;
}

InstructionSet instruction_set() {
  static const InstructionSet chosen = detect_instruction_set();
  return chosen;
}

}  // namespace

template <typename Kind>
Kind choose_kernels() {
  Kind kernels;
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx512) {
    avx512::get_kernels(kernels);
    return kernels;
  }
  if (instruction_set() == InstructionSet::avx2) {
    avx2::get_kernels(kernels);
    return kernels;
  }
#endif
  plain::get_kernels(kernels);
  return kernels;
}

template Kernels<float> choose_kernels();
template Kernels<double> choose_kernels();
template MaskKernel choose_kernels();

std::string instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return "AVX-512";
    case InstructionSet::avx2:
      return "AVX2";
    default:
      return "plain";
  }
}

}  // namespace cpu
}  // namespace maskdino
