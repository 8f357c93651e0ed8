#define LEVEL avx512
#define VECTOR_BYTES 64
#define VECTORS 4
#include "color_cross_entropy/nearest_color_level.h"
