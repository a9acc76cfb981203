// The CUDA part of the library compiled for the CPU, registered as torch.ops.maskdino_emulated.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

using std::exp;
using std::floor;
using std::fmax;
using std::min;

// From here on names of this project change, and what would serve CUDA tensors serves CPU tensors.
#define maskdino maskdino_emulated
#define CUDA CPU

#include "launch.cuh"

#include "cuda/group_norm.cuh"
#include "cuda/sampling.cuh"

namespace maskdino {
namespace cuda {
namespace {
SampleLevel levels[kSharedBytes / sizeof(SampleLevel)];  // the kernels' shared memory
Moments group_shared[4 * kGroupThreads];
}  // namespace
inline char* shared_memory() { return reinterpret_cast<char*>(levels); }
}  // namespace cuda
}  // namespace maskdino

#include "cuda/add_norm.cu"
#include "cuda/add_norm_cuda.cpp"
#include "cuda/affine.cu"
#include "cuda/affine_cuda.cpp"
#include "cuda/backward.cu"
#include "cuda/forward.cu"
#include "cuda/group_norm.cu"
#include "cuda/group_norm_cuda.cpp"
#include "cuda/inference.cu"
#include "cuda/inference_cuda.cpp"
#include "cuda/masks.cu"
#include "cuda/masks_cuda.cpp"
#include "cuda/ms_deform_attn_cuda.cpp"
#include "cuda/packed_masks.cu"
#include "cuda/packed_masks_cuda.cpp"
#include "ms_deform_attn.cpp"
