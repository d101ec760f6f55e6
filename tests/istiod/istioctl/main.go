// istioctl-ztunnel reads a dump of a node agent (`/config_dump`) on standard input with the very code of `istioctl ztunnel-config`,
// and prints what each of its commands prints: `all`, then every dump in JSON. It fails where istioctl would.
package main

import (
	"fmt"
	"io"
	"os"

	"istio.io/istio/istioctl/pkg/writer/ztunnel/configdump"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	dump, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	writer := &configdump.ConfigWriter{Stdout: os.Stdout, FullDump: dump}
	if err := writer.Prime(dump); err != nil {
		return err
	}
	for _, print := range []func() error{
		func() error { return writer.PrintFullSummary(true) },
		func() error { return writer.PrintWorkloadDump(configdump.WorkloadFilter{}, "json") },
		func() error { return writer.PrintServiceDump(configdump.ServiceFilter{}, "json") },
		func() error { return writer.PrintPolicyDump(configdump.PolicyFilter{}, "json") },
		func() error { return writer.PrintConnectionsDump(configdump.ConnectionsFilter{}, "json") },
		func() error { return writer.PrintSecretDump("json") },
	} {
		if err := print(); err != nil {
			return err
		}
	}
	return nil
}
