package apiserver

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"sluice/internal/kube"
)

// CreateEvent implements kube.Cluster.
func (c *Cluster) CreateEvent(ctx context.Context, e kube.Event) error {
	kind := corev1.EventTypeNormal
	if e.Warning {
		kind = corev1.EventTypeWarning
	}
	at := metav1.NewTime(e.Time)
	object := &corev1.Event{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta: metav1.ObjectMeta{Namespace: e.Pod.Namespace, Name: e.Name},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: e.Pod.Namespace, Name: e.Pod.Name, UID: types.UID(e.Pod.UID), FieldPath: e.Field,
		},
		Reason: e.Reason, Message: e.Message, Type: kind,
		Source:              corev1.EventSource{Component: e.Component, Host: e.Node},
		ReportingController: e.Component, ReportingInstance: e.Node,
		FirstTimestamp: at, LastTimestamp: at, Count: 1,
	}
	return c.do(ctx, http.MethodPost, namespacePath(e.Pod.Namespace)+"/events", "application/json", object, nil)
}

// RepeatEvent implements kube.Cluster.
func (c *Cluster) RepeatEvent(ctx context.Context, r kube.Repeat) error {
	patch := map[string]any{"count": r.Count, "lastTimestamp": metav1.NewTime(r.Last), "message": r.Message}
	return c.do(ctx, http.MethodPatch, namespacePath(r.Namespace)+"/events/"+url.PathEscape(r.Name), merge, patch, nil)
}

func namespacePath(namespace string) string { return "/api/v1/namespaces/" + url.PathEscape(namespace) }

// pod is the part of a pod that matters here.
type pod struct {
	Metadata struct{ UID string }
	Spec     struct {
		Containers, InitContainers, EphemeralContainers []struct{ Name string }
	}
	Status struct{ Conditions []corev1.PodCondition }
}

// patchStatus patches a pod's status with conditions and returns what came of it.
func (c *Cluster) patchStatus(ctx context.Context, ref kube.PodRef, conditions ...corev1.PodCondition) (pod, error) {
	// The UID in the patch makes it fail for another pod of that name.
	patch := map[string]any{"metadata": map[string]any{"uid": ref.UID}}
	if len(conditions) > 0 {
		patch["status"] = map[string]any{"conditions": conditions}
	}
	var p pod
	err := c.do(ctx, http.MethodPatch, namespacePath(ref.Namespace)+"/pods/"+url.PathEscape(ref.Name)+"/status", strategic, patch, &p)
	if err == nil && p.Metadata.UID != ref.UID {
		err = fmt.Errorf("pod %s %w: it has UID %s, not %s", ref, kube.ErrConflict, p.Metadata.UID, ref.UID)
	}
	return p, err
}

// Pod implements kube.Cluster.
func (c *Cluster) Pod(ctx context.Context, ref kube.PodRef) (kube.Pod, error) {
	p, err := c.patchStatus(ctx, ref)
	if err != nil {
		return kube.Pod{}, err
	}
	known := kube.Pod{Fields: map[string]string{}}
	for field, containers := range map[string][]struct{ Name string }{
		"containers": p.Spec.Containers, "initContainers": p.Spec.InitContainers, "ephemeralContainers": p.Spec.EphemeralContainers,
	} {
		for _, container := range containers {
			known.Fields[container.Name] = fmt.Sprintf("spec.%s{%s}", field, container.Name)
		}
	}
	for _, cond := range p.Status.Conditions {
		if cond.Type == kube.ConditionType {
			known.Condition = kube.Condition{
				Status: string(cond.Status), Reason: cond.Reason, Message: cond.Message, Since: cond.LastTransitionTime.UTC(),
			}
		}
	}
	return known, nil
}

// SetCondition implements kube.Cluster.
func (c *Cluster) SetCondition(ctx context.Context, ref kube.PodRef, cond kube.Condition) error {
	_, err := c.patchStatus(ctx, ref, corev1.PodCondition{
		Type: kube.ConditionType, Status: corev1.ConditionStatus(cond.Status), Reason: cond.Reason, Message: cond.Message,
		LastTransitionTime: metav1.NewTime(cond.Since.Truncate(time.Second)),
	})
	return err
}
