#define LEVEL portable
#define VECTOR_BYTES 16
#include "color_cross_entropy/softmax_level.h"
