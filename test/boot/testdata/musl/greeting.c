#include <string.h>
int greeting_length(const char *name) { return (int)strlen(name); }
