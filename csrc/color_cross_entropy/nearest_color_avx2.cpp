#define LEVEL avx2
#define VECTOR_BYTES 32
#define VECTORS 3
#include "color_cross_entropy/nearest_color_level.h"
