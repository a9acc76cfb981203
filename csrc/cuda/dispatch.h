// Types in which products are computed.
#pragma once

#include <ATen/Dispatch.h>

#define MASKDINO_DISPATCH(type, ...)                                             \
  AT_DISPATCH_SWITCH(type, "maskdino",                                           \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE( \
                         at::kHalf, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))
