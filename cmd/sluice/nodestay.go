package main

import "github.com/spf13/cobra"

// newStayCommand is what a pod of a DaemonSet runs when its init containers have
// done all there is to do: Kubernetes starts again what ends.
func newStayCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "stay",
		Short:  "Do nothing until told to end",
		Hidden: true,
		Args:   arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			<-cmd.Context().Done()
			return nil
		},
	}
}
