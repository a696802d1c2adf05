#include <pwd.h>
#include <stdio.h>
#include <unistd.h>

int greeting_length(const char *name);

int main(int argc, char **argv) {
	struct passwd *p = getpwuid(getuid());
	printf("ready as %s, %d letters\n", p ? p->pw_name : "?", greeting_length(argv[0]));
	fflush(stdout);
	pause();
}
