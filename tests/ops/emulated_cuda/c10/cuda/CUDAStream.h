#pragma once
namespace c10::cuda {
struct Stream {
  void* stream() const { return nullptr; }
};
inline Stream getCurrentCUDAStream() { return {}; }
}  // namespace c10::cuda
