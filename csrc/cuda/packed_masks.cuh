// Samples of packed masks on a GPU: what the host calls.
#pragma once

#include <cuda_runtime_api.h>

#include "../packed_masks.h"

namespace maskdino {
namespace cuda {

void launch_sample_packed_masks(const MaskSamples& samples, cudaStream_t stream);

}  // namespace cuda
}  // namespace maskdino
