#define LEVEL avx512
#define VECTOR_BYTES 64
#include "color_cross_entropy/softmax_level.h"
