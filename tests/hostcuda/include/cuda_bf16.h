// Stands for the header of the CUDA toolkit.
#include "hostcuda/halves.hpp"
