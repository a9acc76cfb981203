// Stands in for torch's header in a build with ThreadSanitizer: the same split among threads, which
// the sanitizer sees begin and end. It cannot see how OpenMP's threads wait for each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

static int64_t get_num_threads() { return 4; }

template <typename Body>
static void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t most = (end - begin + grain - 1) / grain;
  const int64_t parts = std::clamp<int64_t>(most, 1, get_num_threads());
  const int64_t step = (end - begin + parts - 1) / parts;
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += step) {
    threads.emplace_back([&body, from, to = std::min(from + step, end)] { body(from, to); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
