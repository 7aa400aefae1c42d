// CUDA C++ for g++: kernels run on the CPU, for tests. docs/cuda_without_gpu.md tells how.
#pragma once
#include "hostcuda/language.hpp"
#include "hostcuda/scheduler.hpp"
#include "hostcuda/device.hpp"
#include "hostcuda/halves.hpp"
#include "hostcuda/entry.hpp"
