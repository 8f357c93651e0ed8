#define LEVEL avx2
#define VECTOR_BYTES 32
#include "color_cross_entropy/softmax_level.h"
