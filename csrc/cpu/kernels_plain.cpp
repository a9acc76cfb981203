// The CPU kernels for any processor: vectors of 16 bytes, which every compiler target has or
// emulates.
#include "kernels.h"

#define MASKDINO_INSTRUCTION_SET plain
#define MASKDINO_VECTOR_BYTES 16
#include "kernels_impl.h"
