package install

import (
	"fmt"
	"strings"
)

// UnitName is the daemon's systemd unit.
const UnitName = "sluice-node.service"

const unitPath = "/etc/systemd/system/" + UnitName

// unitText takes the units that it starts before, and the command. All mounts
// have to be in the machine's namespace, so whatever would give the service one
// of its own is left out (PrivateTmp=, Protect…=, ReadOnlyPaths=), and so are
// device filters, which would hide /dev/fuse.
const unitText = `# Made by sluice node install, removed by sluice node uninstall.
[Unit]
Description=Sluice: containers start while their images arrive
After=local-fs.target
Before=%s kubelet.service

[Service]
ExecStart=%s
Restart=always
RestartSec=1
# The holder keeps the kernel's connection while the daemon restarts.
KillMode=process
TimeoutStopSec=60
OOMScoreAdjust=-999
LimitNOFILE=1048576
TasksMax=infinity
# Mounts must be seen by containerd: no namespace of its own, no device filter.
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
CapabilityBoundingSet=~CAP_SYS_BOOT CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_TIME CAP_WAKE_ALARM CAP_SYSLOG CAP_BPF CAP_PERFMON

[Install]
WantedBy=multi-user.target
`

func (o Options) unit() file {
	words := []string{unitWord(o.Installed()), "node"}
	for _, f := range o.Flags {
		words = append(words, unitWord(f))
	}
	text := fmt.Sprintf(unitText, o.ContainerdUnit, strings.Join(words, " "))
	return file{path: unitPath, content: []byte(text), mode: 0o644, why: "systemd: start the daemon", step: StepDaemon}
}

// unitWord writes a word so that systemd gives it to the program as it is.
func unitWord(w string) string {
	w = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%", "$", "$$", "\n", `\n`, "\t", `\t`).Replace(w)
	if w == "" || strings.ContainsAny(w, " ;'\"\\") {
		return `"` + w + `"`
	}
	return w
}
