{{- define "sluice.image" -}}
{{- $repo := required "image.repository: say where your cluster finds the image of deploy/Dockerfile, as in --set image.repository=registry.example.com/sluice" .Values.image.repository -}}
{{- if .Values.image.digest }}{{ $repo }}@{{ .Values.image.digest }}{{ else }}{{ $repo }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end -}}
{{- end }}

{{/* Labels of everything; the argument is (list . COMPONENT). */}}
{{- define "sluice.labels" -}}
{{- $root := index . 0 -}}
{{ include "sluice.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- end }}

{{- define "sluice.selector" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Where pods of the node DaemonSets run. */}}
{{- define "sluice.placement" -}}
nodeSelector:
  kubernetes.io/os: linux
  {{- with .Values.node.nodeSelector }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
affinity:
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms:
        - matchExpressions:
            - key: kubernetes.io/arch
              operator: In
              values: [amd64, arm64]
{{- with .Values.node.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.node.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* The Secret of the registry. */}}
{{- define "sluice.registrySecret" -}}
{{ .Values.registry.existingSecret | default "sluice-registry" }}
{{- end }}

{{/* Keys of that Secret that the registry reads, each with its variable and the value that would make it. */}}
{{- define "sluice.registrySecretKeys" -}}
{{- $r := .Values.registry -}}
{{- $keys := list -}}
{{- if $r.auth.enabled }}{{ $keys = append $keys (dict "key" "admin-password" "env" "AUTH_ADMIN_PASSWORD_FILE" "name" "adminPassword" "value" $r.secrets.adminPassword) }}{{ end -}}
{{- if and (eq $r.storage.kind "s3") $r.storage.s3.accessKey }}{{ $keys = append $keys (dict "key" "s3-secret-key" "env" "STORAGE_S3_SECRET_KEY_FILE" "name" "s3SecretKey" "value" $r.secrets.s3SecretKey) }}{{ end -}}
{{- if and (eq $r.storage.kind "azure") (not $r.storage.azure.serviceURL) }}{{ $keys = append $keys (dict "key" "azure-connection-string" "env" "STORAGE_AZURE_CONNECTION_STRING_FILE" "name" "azureConnectionString" "value" $r.secrets.azureConnectionString) }}{{ end -}}
{{- if ne $r.storage.kind "local" }}{{ $keys = append $keys (dict "key" "database-url" "env" "DATABASE_URL_FILE" "name" "databaseURL" "value" $r.secrets.databaseURL) }}{{ end -}}
{{- toJson $keys -}}
{{- end }}

{{- define "sluice.registryScheme" -}}
{{ if .Values.registry.tls.existingSecret }}https{{ else }}http{{ end }}
{{- end }}
