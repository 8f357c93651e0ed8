#define LEVEL portable
#define VECTOR_BYTES 16
#define VECTORS 2
#include "color_cross_entropy/nearest_color_level.h"
