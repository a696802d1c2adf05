package boot

import "sluice/oci"

// recipe says how an image is made and started.
type recipe struct {
	name     string
	packages string            // of Debian; empty: the image has nothing but files and what made copies
	files    map[string]string // where in the image, a file of testdata
	setup    string            // shell, in the image
	made     func(m *maker, root string) error
	config   oci.ImageConfig
	ready    string // what it prints, in whatever case, when it's ready
}

// command is a config with these.
func command(entrypoint []string, cmd ...string) oci.ImageConfig {
	var c oci.ImageConfig
	c.Config.Entrypoint, c.Config.Cmd = entrypoint, cmd
	c.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return c
}

// with adds to a config what some need.
func with(c oci.ImageConfig, user, dir string, env ...string) oci.ImageConfig {
	c.Config.User, c.Config.WorkingDir = user, dir
	c.Config.Env = append(c.Config.Env, env...)
	return c
}

// recipes are the images: what people run most, in the manner in which the
// images that they run are made. The last four were not looked at when most of
// the rules of boot plans were made, so that they tell what those are worth
// elsewhere; nothing in the rules knows of MariaDB or HAProxy.
func recipes() []recipe {
	entry := []string{"docker-entrypoint.sh"}
	return []recipe{
		{
			name: "python", packages: "python3-flask", files: map[string]string{"app/main.py": "python/main.py"},
			config: with(command(nil, "python3", "main.py"), "", "/app", "LANG=C.UTF-8"), ready: "ready on port",
		},
		{
			name: "node", packages: "nodejs node-express",
			files: map[string]string{
				"app/server.js": "node/server.js", "app/lib/greet.js": "node/lib/greet.js",
				"usr/local/bin/docker-entrypoint.sh": "node/docker-entrypoint.sh",
			},
			config: with(command(entry, "node", "server.js"), "", "/app"), ready: "ready on port",
		},
		{
			name: "java", packages: "default-jre-headless libh2-java",
			config: with(command(nil, "java", "-cp", "/usr/share/java/h2.jar", "org.h2.tools.Server", "-tcp", "-tcpPort", "0"), "", "", "LANG=C.UTF-8"),
			ready:  "tcp server running",
		},
		{
			name: "nginx", packages: "nginx-light",
			files:  map[string]string{"docker-entrypoint.sh": "nginx/docker-entrypoint.sh", "docker-entrypoint.d/10-tune.sh": "nginx/10-tune.sh"},
			setup:  `sed -i 's/listen 80 default_server;/listen unix:\/run\/http.sock;/; /listen \[::\]/d' /etc/nginx/sites-available/default`,
			config: command([]string{"/docker-entrypoint.sh"}, "nginx", "-g", "daemon off; error_log /dev/stderr notice;"), ready: "start worker process ",
		},
		{
			name: "redis", packages: "redis-server", files: map[string]string{"usr/local/bin/docker-entrypoint.sh": "redis/docker-entrypoint.sh"},
			setup:  `mkdir /data; chown redis /data`,
			config: with(command(entry, "redis-server", "--port", "0", "--unixsocket", "/data/redis.sock"), "", "/data"), ready: "ready to accept connections",
		},
		{
			name: "postgres", packages: "postgresql-15 locales", files: map[string]string{"usr/local/bin/docker-entrypoint.sh": "postgres/docker-entrypoint.sh"},
			setup: `localedef -i en_US -c -f UTF-8 -A /usr/share/locale/locale.alias en_US.UTF-8
				mkdir -p /var/lib/postgresql/data; chown -R postgres:postgres /var/lib/postgresql`,
			config: func() oci.ImageConfig {
				c := command(entry, "postgres", "-c", "listen_addresses=", "-k", "/tmp")
				c.Config.Env = []string{
					"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/15/bin",
					"LANG=en_US.utf8", "PGDATA=/var/lib/postgresql/data",
				}
				c.Config.User = "postgres"
				return c
			}(),
			ready: "database system is ready to accept connections",
		},
		{
			name: "go", made: (*maker).staticGo,
			config: command([]string{"/crane"}, "registry", "serve", "--address", "127.0.0.1:0"), ready: "serving on",
		},
		{
			name: "musl", made: (*maker).muslRoot,
			files:  map[string]string{"start.sh": "musl/start.sh"},
			config: command(nil, "/start.sh"), ready: "ready as",
		},
		{
			name: "perl", packages: "perl libhttp-daemon-perl", files: map[string]string{"app/app.pl": "perl/app.pl"},
			config: with(command(nil, "./app.pl"), "", "/app"), ready: "ready {",
		},
		{
			name: "php", packages: "php-cli", files: map[string]string{"app/index.php": "php/index.php", "app/lib.php": "php/lib.php"},
			config: with(command(nil, "php", "/app/index.php"), "", "/app"), ready: "ready {",
		},
		{
			name: "ruby", packages: "ruby ruby-webrick", files: map[string]string{"app/app.rb": "ruby/app.rb", "app/lib/greet.rb": "ruby/lib/greet.rb"},
			config: with(command([]string{"ruby"}, "app.rb"), "", "/app", "LANG=C.UTF-8"), ready: "ready {",
		},
		{
			name: "haproxy", packages: "haproxy",
			setup:  `printf 'global\n  stats socket /run/h.sock\ndefaults\n  mode http\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\nfrontend f\n  bind /run/h2.sock\n' >/etc/haproxy/haproxy.cfg`,
			config: command(nil, "haproxy", "-W", "-db", "-f", "/etc/haproxy/haproxy.cfg"), ready: "loading success",
		},
		{
			name: "gunicorn", packages: "gunicorn python3-numpy tini", files: map[string]string{"srv/wsgi.py": "gunicorn/wsgi.py"},
			config: with(command([]string{"tini", "--"}, "gunicorn", "--preload", "--bind", "unix:/tmp/g.sock", "wsgi:app"), "nobody", "/srv"), ready: "booting worker",
		},
		{
			name: "apache", packages: "apache2",
			setup:  `sed -i 's/^Listen 80$/Listen 127.0.0.1:18089/' /etc/apache2/ports.conf; ln -sf /dev/stderr /var/log/apache2/error.log`,
			config: with(command([]string{"/bin/sh", "-c", "mkdir -p /run/lock && exec apache2ctl -D FOREGROUND"}), "", "", "APACHE_ULIMIT_MAX_FILES=true"), ready: "resuming normal operations",
		},
		{
			name: "mariadb", packages: "mariadb-server", files: map[string]string{"usr/local/bin/docker-entrypoint.sh": "mariadb/docker-entrypoint.sh"},
			setup:  `rm -rf /var/lib/mysql/*; mkdir -p /run/mysqld; chown mysql /run/mysqld`,
			config: with(command(entry, "mariadbd", "--skip-networking", "--socket=/tmp/m.sock", "--pid-file=/tmp/m.pid"), "mysql", ""), ready: "ready for connections",
		},
	}
}
